"""The lab: the application that `./server` serves when none is named.

Its page shows which processes answer, and has buttons that do to them what must not happen to a
server, so that one sees what this one makes of it. These work for visitors from this machine;
with LAB=1 in the environment (./server -e LAB=1) they work for everybody.
"""
import base64
import hashlib
import html
import json
import os
import re
import signal
import time
from datetime import timedelta

HANG = 120  # seconds: more than a --timeout usually is
MIB = 1 << 20
TEXT, JSON, HTML = "text/plain; charset=utf-8", "application/json", "text/html; charset=utf-8"

# Every runner is a process, with variables of its own.
started = time.monotonic()
requests = 0
leaked = []

STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1d2127; --soft: #eff1f4; --line: #6f7681;
  --accent: #0b57d0; --on-accent: #fff; }
@media (prefers-color-scheme: dark) { :root { --back: #14171b; --text: #e4e7eb; --soft: #23282f;
  --line: #8b949e; --accent: #8ab4f8; --on-accent: #10151c; } }
* { box-sizing: border-box; }
body { max-width: 52rem; margin: auto; padding: 1rem; background: var(--back); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; }
h2 { margin: 2.5rem 0 0; font-size: 1.25rem; }
code { padding: .1em .3em; border-radius: .25rem; background: var(--soft); white-space: nowrap; }
code, td, th { font: .875rem/1.5 ui-monospace, monospace; overflow-wrap: anywhere; }
table { width: 100%; margin-top: 1rem; border-collapse: collapse; }
td, th { padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--soft); text-align: left;
  vertical-align: top; }
th { width: 40%; }
button { min-height: 2.5rem; min-width: 6rem; margin-right: .5rem; font: inherit;
  border: 1px solid var(--accent); border-radius: .4rem; background: var(--accent);
  color: var(--on-accent); }
button:disabled { border-color: var(--line); background: none; color: var(--line); }
:focus-visible { outline: 3px solid var(--text); outline-offset: 2px; }
fieldset { min-width: 0; margin: 0; padding: 0; border: 0; }
.try { padding-bottom: 1rem; border-bottom: 1px solid var(--line); }
.notice { padding: .6rem 1rem; border-left: 4px solid var(--accent); background: var(--soft); }
input, progress { max-width: 100%; font: inherit; accent-color: var(--accent); }
output { display: block; margin-top: .6rem; font-weight: 600; white-space: pre-line;
  overflow-wrap: anywhere; }
svg { display: block; width: 100%; margin-top: 1rem; font-size: 13px; }
text { fill: var(--text); } path { fill: none; stroke: var(--line); }
.box { fill: var(--soft); stroke: var(--line); } .lane { fill: var(--soft); }
.last { stroke: var(--accent); stroke-width: 3; } .answer { stroke: var(--accent); }
"""

SCRIPT = r"""
const $ = (id) => document.getElementById(id);
const answers = [];  // which workers gave the last hundred, oldest first
let last = {};       // the last answer of /whoami
let tree = {};       // the runners of each worker
const runners = () => Object.values(tree).flat();
const since = (start) => ((performance.now() - start) / 1000).toFixed(2) + " s";

async function ask(query = "") {
  const response = await fetch("whoami" + query, {cache: "no-store"});  // else one at a time
  if (!response.ok) { throw new Error("status " + response.status); }
  const who = last = await response.json();
  // Without /proc, the tree grows from what the answers say of themselves.
  tree = who.tree || {...tree, [who.worker]: [who.runner]};
  return who;
}

function draw() {
  const svg = $("picture"), width = Math.max(svg.getBoundingClientRect().width, 320);
  const add = (name, attributes, text = "") => {
    const node = document.createElementNS(svg.namespaceURI, name);
    for (const each in attributes) { node.setAttribute(each, attributes[each]); }
    node.textContent = text;
    svg.append(node);
  };
  const box = (x, y, name, pid, isLast) => {
    add("rect", {x, y, width: 130, height: 28, rx: 5, class: isLast ? "box last" : "box"});
    add("text", {x: x + 65, y: y + 19, "text-anchor": "middle"}, name + " " + pid);
  };
  svg.replaceChildren();
  const wide = width > 620;  // else the lanes are below their workers, not beside them
  const x = wide ? 340 : 26, step = (width - x - 36) / 100;
  let y = 2, described = "";
  if (last.arbiter) {
    box(2, y, "arbiter", last.arbiter, false);
    described = `Arbiter ${last.arbiter}. `;
    y += 42;
  }
  for (const worker in tree) {
    const own = tree[worker], count = answers.filter((each) => each == worker).length;
    if (last.arbiter) { add("path", {d: `M12 30V${y + 14}H26`}); }
    box(26, y, "worker", worker, worker == last.worker);
    own.forEach((runner, i) => {
      add("path", {d: `M156 ${y + 14}H166V${y + 14 + 36 * i}H176`});
      box(176, y + 36 * i, "runner", runner, runner == last.runner);
    });
    const top = wide ? y : y + 36 * own.length;
    add("rect", {x, y: top, width: 100 * step, height: 28, class: "lane"});
    const mark = (each, i) => each == worker ? `M${x + (i + .5) * step} ${top}v28` : "";
    add("path", {d: answers.map(mark).join(""), "stroke-width": step * .75, class: "answer"});
    add("text", {x: x + 100 * step + 8, y: top + 19}, count);
    described += `Worker ${worker} with runner ${own.join(" and ")}: ${count} of the last ` +
                 `${answers.length} answers. `;
    y = Math.max(y + 36 * own.length, top + 36) + 10;
  }
  svg.setAttribute("height", y);
  svg.setAttribute("aria-label", described);
}

async function fire(number, say) {
  const start = performance.now(), by = {};
  await Promise.all(Array.from({length: number}, async () => {
    const who = await ask($("slow").checked ? "?slow" : "").catch((error) => error);
    const name = who.worker ? "worker " + who.worker : who.message;
    by[name] = (by[name] || 0) + 1;
    if (who.worker) { answers.push(who.worker); }
    answers.splice(0, answers.length - 100);
    draw();
  }));
  const shares = Object.entries(by).map(([name, times]) => `${times} by ${name}`);
  say(`${number} in ${since(start)}: ${shares.join(", ")}`);
}

async function experiment(path, say) {
  await ask();
  const before = runners(), start = performance.now();
  say("The request is under way …");
  const response = await fetch(path, {method: "POST"}), text = await response.text();
  const result = `${response.status} ${response.statusText} after ${since(start)}. `;
  if (response.status != 502 && response.status != 504) {
    return say(result + (response.status == 500 ? "The runner goes on." : text));
  }
  for (const end = performance.now() + 5000; performance.now() < end;) {
    await ask().catch(() => {});
    const gone = before.filter((each) => !runners().includes(each));
    const fresh = runners().filter((each) => !before.includes(each));
    if (gone.length && fresh.length) {
      return say(`${result}Runner ${gone} has ended, runner ${fresh} has taken its place.`);
    }
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  say(result);
}

async function stream(say) {
  const start = performance.now(), response = await fetch("stream");
  const reader = response.body.getReader(), decoder = new TextDecoder();
  let text = "";
  for (let part; !(part = await reader.read()).done;) {
    say(text += decoder.decode(part.value, {stream: true}));
  }
  say(`${text}${response.status}, complete after ${since(start)}`);
}

const upload = (say) => new Promise((resolve) => {
  const request = new XMLHttpRequest();  // fetch() does not tell how far an upload is
  request.open("POST", "upload");
  request.upload.onprogress = (event) => { $("progress").value = event.loaded / event.total; };
  const end = () => say(`${request.status || "No answer"} ${request.response.trim()}`);
  request.onloadend = () => resolve(end());
  request.send($("file").files[0] || new Blob([new Uint8Array(32 << 20)]));
});

for (const button of document.querySelectorAll("button")) {
  const [name, number] = button.dataset.do.split(" ");
  const say = (text) => { $(name + "-result").textContent = text; };
  const run = {fire: () => fire(number, say), stream: () => stream(say), upload: () => upload(say)};
  let busy = false;
  button.addEventListener("click", async () => {
    if (busy) { return; }
    busy = true;
    await (run[name] || (() => experiment(name, say)))().catch((error) => say(error.message));
    busy = false;
    draw();
  });
}
addEventListener("resize", draw);
ask().then(draw);
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Hello, World! The lab</title>
<link rel="icon" href="data:,">
<style>%(style)s</style>
</head>
<body>
<main>
<h1>Hello, World!</h1>
<p>This is <code>app_example.py</code>, the application that <code>./server</code> serves when none
is named. It shows the processes of the server at work, and does to them what must not happen to
a server. This page was made by:</p>
<ul>%(makers)s</ul>
<noscript><p class="notice">The buttons need JavaScript; <code>curl</code> does the same.</p>
</noscript>

<h2>Who answers</h2>
<p>Any worker that waits may take a new connection. In the lane of a worker is a mark for each of
the last hundred answers that came from it. A browser has about six requests under way at a time;
more wait in the browser.</p>
<div role="group" aria-label="Send requests">
<button type="button" data-do="fire 1">Send 1</button>
<button type="button" data-do="fire 20">Send 20</button>
<button type="button" data-do="fire 100">Send 100</button>
<label><input type="checkbox" id="slow"> each takes 50 ms</label>
</div>
<output id="fire-result" aria-live="polite"></output>
<svg id="picture" role="img" aria-label="The tree of processes"></svg>

<h2>Experiments</h2>
%(safe)s
%(notice)s
<fieldset aria-label="Experiments for visitors from this machine"%(disabled)s>
%(dangerous)s
</fieldset>

<h2>The environ of this request</h2>
<table><tbody>%(environ)s</tbody></table>
</main>
<script>%(script)s</script>
</body>
</html>
"""

EXPERIMENT = """<div class="try"><p><code>%(method)s /%(name)s</code> %(text)s</p>
<button type="button" data-do="%(name)s">%(label)s</button>
<output id="%(name)s-result" aria-live="polite"></output></div>"""

EXPERIMENTS = {
    "stream": """yields a line every 0.2 seconds. What an application yields goes to the client at
        once.""",
    "error": "raises an exception: 500, and the error log has the traceback.",
    "crash": """ends the interpreter with a segmentation fault: 502, and a new runner. No other
        client notices, unless <code>--threads</code> gave the same runner its request, too.""",
    "hang": """sleeps for %d seconds. An application that says nothing for <code>--timeout</code>
        seconds, 30 unless set, is ended by the server: 504, a new runner, and the error log tells
        where it hung. <code>./server -t 5</code> is for the impatient. Send some requests
        meanwhile: the other workers answer them.""" % HANG,
    "leak": """keeps 8 MiB more in the memory of the runner that happens to answer. With
        <code>--max-requests N</code> a runner is replaced after N requests, and the memory is free
        again.""",
    "upload": """counts and hashes its body. The server takes all of it before the application is
        called: a client that sends slowly keeps no runner busy. Without a file, 32 MiB of zeros are
        sent.</p>
        <p><label>File: <input type="file" id="file"></label>
        <label>Sent: <progress id="progress" max="1" value="0"></progress></label>"""}

NOTICE = """<p class="notice">The experiments below are switched off, because you come through
a proxy, from another machine, or did not call this one <code>localhost</code> or
<code>127.0.0.1</code>. <code>./server -e LAB=1</code> switches them on for every visitor.</p>"""


def policy_source(text):
    """How a Content-Security-Policy names an inline script or style: by its hash."""
    return "'sha256-%s'" % base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


HEADERS = [  # of every answer. Only this very script may run, and talk to nobody but this server.
    ("Content-Security-Policy",
     "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
     "frame-ancestors 'none'; script-src %s; style-src %s"
     % (policy_source(SCRIPT), policy_source(STYLE))),
    ("X-Content-Type-Options", "nosniff"), ("Cache-Control", "no-store"), ("Vary", "Accept")]


def read_proc(path):
    with open("/proc/%s" % path, "rb") as file:
        return file.read()


def whoami():
    """Who answers. This process is the runner; of the others, Linux tells more than their pids."""
    def children(pid):
        return [int(child) for child in read_proc("%d/task/%d/children" % (pid, pid)).split()]

    who = {"runner": os.getpid(), "worker": os.getppid(), "requests": requests,
           "runner_age": round(time.monotonic() - started, 1)}
    try:
        stat = read_proc("%d/stat" % who["worker"]).rpartition(b")")[2].split()
        booted_for = time.clock_gettime(time.CLOCK_BOOTTIME)
        started_at = int(stat[19]) / os.sysconf("SC_CLK_TCK")
        who["worker_age"] = round(booted_for - started_at, 1)
        who["arbiter"] = int(stat[1])
        pages = int(read_proc("self/statm").split()[1])
        who["size_mib"] = pages * os.sysconf("SC_PAGE_SIZE") // MIB
        who["tree"] = {worker: children(worker) for worker in children(who["arbiter"])}
    except (AttributeError, IndexError, OSError):
        pass  # another system, or a worker has just ended: then it is left out
    return who


def may_experiment(environ):
    """Whether the visitor sits at this machine, or LAB=1 lets everybody.

    Behind a proxy all visitors seem to: hence the fields that proxies add. A page elsewhere can
    have its own name point to this machine (DNS rebinding): hence the Host, which stays that name.
    On a unix socket the address is empty.
    """
    if os.environ.get("LAB") == "1":
        return True
    proxied = any(re.match("HTTP_(X_FORWARDED|FORWARDED|X_REAL_IP|VIA)", name) for name in environ)
    address = re.fullmatch(r"|::1|(::ffff:)?127(\.\d+){3}", environ.get("REMOTE_ADDR", ""))
    host = re.fullmatch(r"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?", environ.get("HTTP_HOST", ""))
    return bool(not proxied and address and host)


def is_cross_site(environ):
    """Whether a browser sends this for a page of somebody else. Only browsers have these fields."""
    own = [scheme + environ.get("HTTP_HOST", "") for scheme in ("http://", "https://")]
    return (environ.get("HTTP_ORIGIN", own[0]) not in own or
            environ.get("HTTP_SEC_FETCH_SITE", "same-origin") != "same-origin")


# What each path does: it returns a type, and text or an iterable of bytes.

def page(environ):
    who = whoami()

    def made_by(role, does):
        age = role + "_age"
        up = " (up %s)" % timedelta(seconds=int(who[age])) if age in who else ""
        return "%s %d%s %s" % (role, who[role], up, does)

    makers = [made_by("runner", "runs the application; this is its request %d" % requests),
              made_by("worker", "reads requests and writes responses")]
    if "arbiter" in who:
        makers.append(made_by("arbiter", "watches the workers"))
    if "text/html" not in environ.get("HTTP_ACCEPT", ""):
        return TEXT, "\n".join([
            "Hello, World!", "", *makers, "", "GET /whoami /stream",
            "POST /error /crash /hang /leak /upload (from this machine)",
            "In a browser, this page is a lab.", ""])

    def experiment(name):
        return EXPERIMENT % {"name": name, "label": name.capitalize(), "text": EXPERIMENTS[name],
                             "method": "POST" if "/" + name in DANGEROUS else "GET"}

    def row(name, value):  # clients choose what stands here: not escaped, it could hold a script
        return ('<tr><th scope="row">%s</th><td>%s</td></tr>'
                % (html.escape(name).replace("_", "_<wbr>"), html.escape(str(value))))

    allowed = may_experiment(environ)
    return HTML, PAGE % {
        "style": STYLE, "script": SCRIPT, "notice": "" if allowed else NOTICE,
        "disabled": "" if allowed else " disabled",
        "makers": "".join("<li>%s</li>" % maker for maker in makers),
        "safe": experiment("stream"),
        "dangerous": "\n".join(experiment(path[1:]) for path in DANGEROUS),
        "environ": "\n".join(row(*item) for item in sorted(environ.items()))}


def answer_whoami(environ):
    if environ.get("QUERY_STRING") == "slow":
        time.sleep(0.05)
    return JSON, json.dumps(whoami()) + "\n"


def stream(environ):
    def lines():
        for number in range(10):
            time.sleep(0.2 if number else 0)
            yield b"line %d of 10\n" % (number + 1)
    return TEXT, lines()


def error(environ):
    raise RuntimeError("the lab was asked to raise an exception")


def crash(environ):
    os.kill(os.getpid(), signal.SIGSEGV)


def hang(environ):
    time.sleep(HANG)
    return TEXT, "No --timeout ended the sleep.\n"


def leak(environ):
    if len(leaked) < 64:  # enough to be seen, too little to harm the machine
        leaked.append(b"x" * (8 * MIB))
    return TEXT, "Runner %d keeps %d MiB; its size is %s MiB.\n" % (
        os.getpid(), 8 * len(leaked), whoami().get("size_mib", "an unknown number of"))


def upload(environ):
    size, digest = 0, hashlib.sha256()
    for piece in iter(lambda: environ["wsgi.input"].read(65536), b""):
        size += len(piece)
        digest.update(piece)
    return JSON, json.dumps({"bytes": size, "sha256": digest.hexdigest()}) + "\n"


HARMLESS = {"/": page, "/whoami": answer_whoami, "/stream": stream}
DANGEROUS = {"/error": error, "/crash": crash, "/hang": hang, "/leak": leak, "/upload": upload}


def app(environ, start_response):
    global requests
    requests += 1
    path, method = environ.get("PATH_INFO") or "/", environ["REQUEST_METHOD"]
    allow = "POST" if path in DANGEROUS else "GET, HEAD"
    status, kind, headers = "200 OK", TEXT, list(HEADERS)
    if path not in HARMLESS and path not in DANGEROUS:
        status, body = "404 Not Found", "There is nothing here. Begin at /\n"
    elif method not in allow.split(", "):
        status, body = "405 Method Not Allowed", "Allowed: %s\n" % allow
        headers.append(("Allow", allow))
    elif path in DANGEROUS and is_cross_site(environ):
        status, body = "403 Forbidden", "Not for a page of another site.\n"
    elif path in DANGEROUS and not may_experiment(environ):
        status, body = "403 Forbidden", "Only from this machine, or with ./server -e LAB=1\n"
    else:
        kind, body = {**HARMLESS, **DANGEROUS}[path](environ)
    if isinstance(body, str):
        body = [body.encode()]
        headers.append(("Content-Length", str(len(body[0]))))
    start_response(status, [("Content-Type", kind)] + headers)
    return [] if method == "HEAD" else body
