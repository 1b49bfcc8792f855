// test_server.cpp: unit tests of the pure parts of server.cpp, and end-to-end tests of ./server.
//
//   make test                        everything
//   ./test_server -tc='*reload*'     what matches
//
// An end-to-end test starts the real program ($SERVER, ./server by default) on port 0 with an
// application of its own, talks to it over real sockets, and leaves no process behind.
#define DOCTEST_CONFIG_IMPLEMENT
#define DOCTEST_CONFIG_NO_POSIX_SIGNALS
#include <doctest/doctest.h>

#define main server_main
#include "server.cpp"
#undef main

#include <dirent.h>
#include <poll.h>

#include <functional>
#include <map>
#include <set>
#include <sstream>

namespace test {

using std::map;
using std::vector;

// --- helpers ----------------------------------------------------------------

/// Waits until `condition` holds, looking every 5 ms; false after `limit`.
bool wait_for(const std::function<bool()>& condition, std::chrono::milliseconds limit = 5s) {
    const Time end = Clock::now() + limit;
    while (!condition()) {
        if (Clock::now() > end) { return false; }
        ::poll(nullptr, 0, 5);
    }
    return true;
}

double seconds_since(Time start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

string read_file(const string& path) {
    const Fd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
    string text;
    char buffer[65536];
    for (ssize_t n; fd && (n = ::read(fd.get(), buffer, sizeof buffer)) > 0;) {
        text.append(buffer, static_cast<size_t>(n));
    }
    return text;
}

void write_file(const string& path, const string& text) {
    const Fd fd(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
    REQUIRE(write_all(fd, text));
}

bool contains(const string& text, const string& part) { return text.find(part) != string::npos; }

size_t count(const string& text, const string& part) {
    size_t n = 0;
    for (size_t at = text.find(part); at != string::npos; at = text.find(part, at + 1)) { ++n; }
    return n;
}

/// A fresh directory, removed with all in it at the end.
struct TempDir {
    string path;
    TempDir() {
        char name[] = "/tmp/server-test-XXXXXX";
        path = ::mkdtemp(name);
    }
    ~TempDir() { (void)!std::system(("rm -rf " + path).c_str()); }
};

/// Processes whose environment holds `mark`: whatever a server under test has started.
vector<pid_t> processes_with(const string& mark) {
    vector<pid_t> found;
    const std::unique_ptr<DIR, int (*)(DIR*)> proc(::opendir("/proc"), ::closedir);
    while (const dirent* entry = ::readdir(proc.get())) {
        const int pid = std::atoi(entry->d_name);
        if (pid <= 0 || pid == ::getpid()) { continue; }
        if (contains(read_file(string("/proc/") + entry->d_name + "/environ"), mark)) {
            found.push_back(pid);
        }
    }
    return found;
}

/// The parent of a process and its name as in /proc/PID/stat; {0, ""} when it has gone.
std::pair<pid_t, char> parent_and_state(pid_t pid) {
    const string stat = read_file("/proc/" + to_string(pid) + "/stat");
    const size_t end = stat.rfind(") ");
    if (end == string::npos) { return {0, ' '}; }
    return {std::atoi(stat.c_str() + end + 4), stat[end + 2]};
}

/// A program under test, by its path: the server with stdout and stderr in files.
struct Server {
    TempDir dir;
    string mark;
    pid_t pid = -1;
    int status = -1;  // as from waitpid, once it has ended
    bool expect_sanitizer_clean = true;

    /// Starts $SERVER with `args`, in a directory that holds `app` as app.py. The application
    /// defaults to app:app. Waits until every worker is ready, unless `wait` is false.
    explicit Server(const string& app, vector<string> args = {}, vector<string> env = {},
                    bool wait = true) {
        static int serial = 0;
        mark = "SERVER_TEST_MARK=" + to_string(::getpid()) + "." + to_string(++serial) + ";";
        write_file(dir.path + "/app.py", app);
        const char* program = std::getenv("SERVER");
        char* absolute = ::realpath(program != nullptr ? program : "./server", nullptr);
        REQUIRE(absolute != nullptr);
        vector<string> words{absolute, "--chdir", dir.path};
        std::free(absolute);
        const auto has = [&](const char* prefix) {
            return std::any_of(args.begin(), args.end(), [&](const string& a) {
                return a.compare(0, std::strlen(prefix), prefix) == 0;
            });
        };
        if (!has("-b") && !has("--bind")) { words.insert(words.end(), {"-b", "127.0.0.1:0"}); }
        if (!has("--access-logfile")) {
            words.insert(words.end(), {"--access-logfile", dir.path + "/access"});
        }
        if (!has("--python")) { words.insert(words.end(), {"--python", "/usr/bin/python3"}); }
        words.insert(words.end(), args.begin(), args.end());
        if (!has("app")) { words.emplace_back("app:app"); }
        pid = ::fork();
        if (pid == 0) {
            ::setpgid(0, 0);
            ::putenv(mark.data());
            for (string& pair : env) { ::putenv(pair.data()); }
            const int out = ::open((dir.path + "/out").c_str(), O_WRONLY | O_CREAT | O_APPEND, 0644);
            const int err = ::open((dir.path + "/err").c_str(), O_WRONLY | O_CREAT | O_APPEND, 0644);
            ::dup2(out, 1);
            ::dup2(err, 2);
            vector<char*> argv;
            for (string& word : words) { argv.push_back(word.data()); }
            argv.push_back(nullptr);
            ::execv(argv[0], argv.data());
            ::_exit(127);
        }
        REQUIRE(pid > 0);
        if (wait) {
            REQUIRE_MESSAGE(wait_for([&] { return ended() || ready_workers() > 0; }, 15s), log());
            REQUIRE_MESSAGE(!ended(), log());
        }
    }

    ~Server() {
        if (!ended()) {
            ::kill(pid, SIGCONT);
            ::kill(pid, SIGQUIT);
        }
        CHECK_MESSAGE(wait_for([&] { return ended(); }, 5s), log());
        CHECK_MESSAGE(wait_for([&] { return processes_with(mark).empty(); }, 5s), log());
        for (const pid_t left : processes_with(mark)) { ::kill(left, SIGKILL); }
        if (!ended()) { ::waitpid(pid, &status, 0); }
        const string text = log();
        CHECK_MESSAGE(!contains(text, "AddressSanitizer"), text);
        CHECK_MESSAGE(!contains(text, "runtime error:"), text);
    }

    string log() const { return read_file(dir.path + "/err"); }
    string out() const { return read_file(dir.path + "/out"); }
    string access() const { return read_file(dir.path + "/access"); }
    bool log_has(const string& text, std::chrono::milliseconds limit = 5s) const {
        return wait_for([&] { return contains(log(), text); }, limit);
    }
    bool access_has(const string& text) const {
        return wait_for([&] { return contains(access(), text); });
    }

    /// The port of the n-th TCP listener, from the "Listening at" line.
    int port(size_t n = 0) const {
        string text = log();
        size_t at = text.find("Listening at: ");
        for (size_t i = 0; i <= n && at != string::npos; ++i) { at = text.find("http://", at + 1); }
        if (at == string::npos) { return 0; }
        at += 7;
        at = text.find(text[at] == '[' ? "]:" : ":", at) + (text[at] == '[' ? 2 : 1);
        return std::atoi(text.c_str() + at);
    }

    bool ended() {
        if (status < 0 && ::waitpid(pid, &status, WNOHANG) != pid) { status = -1; }
        return status >= 0;
    }
    bool wait_end(std::chrono::milliseconds limit = 5s) {
        return wait_for([&] { return ended(); }, limit);
    }
    int exit_code() const { return WIFEXITED(status) ? WEXITSTATUS(status) : -1; }
    void signal(int number) const { ::kill(pid, number); }

    vector<pid_t> children(pid_t parent) const {
        vector<pid_t> found;
        for (const pid_t each : processes_with(mark)) {
            if (parent_and_state(each).first == parent) { found.push_back(each); }
        }
        return found;
    }
    vector<pid_t> workers() const { return children(pid); }
    vector<pid_t> runners() const {
        vector<pid_t> found;
        for (const pid_t worker : workers()) {
            for (const pid_t runner : children(worker)) { found.push_back(runner); }
        }
        return found;
    }

    /// How many workers say by their heartbeat that they are ready: mode bit 2 of an unlinked file.
    size_t ready_workers() const {
        size_t ready = 0;
        const string dir_name = "/proc/" + to_string(pid) + "/fd";
        const std::unique_ptr<DIR, int (*)(DIR*)> fds(::opendir(dir_name.c_str()), ::closedir);
        while (const dirent* entry = fds ? ::readdir(fds.get()) : nullptr) {
            struct stat info {};
            const string path = dir_name + "/" + entry->d_name;
            if (::stat(path.c_str(), &info) == 0 && S_ISREG(info.st_mode) && info.st_nlink == 0 &&
                (info.st_mode & 2) != 0) {
                ++ready;
            }
        }
        return ready;
    }
    bool wait_ready_workers(size_t n, std::chrono::milliseconds limit = 10s) const {
        return wait_for([&] { return ready_workers() >= n; }, limit);
    }
};

/// A client's end of a connection. Every wait is bounded.
struct Client {
    Fd fd;
    explicit Client(const Server& server) : Client(server.port()) {}
    explicit Client(int port) {
        sockaddr_in address{};
        address.sin_family = AF_INET;
        address.sin_port = htons(static_cast<uint16_t>(port));
        address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        fd = Fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
        REQUIRE(::connect(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof address) == 0);
    }
    explicit Client(const string& unix_path) {
        sockaddr_un address{};
        address.sun_family = AF_UNIX;
        unix_path.copy(address.sun_path, sizeof address.sun_path - 1);
        fd = Fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
        REQUIRE(::connect(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof address) == 0);
    }

    /// Sends all of it, reading nothing meanwhile; false once the peer has reset.
    bool send(string_view data) const {
        while (!data.empty()) {
            const ssize_t n = ::send(fd.get(), data.data(), data.size(), MSG_NOSIGNAL);
            if (n <= 0) { return false; }
            data.remove_prefix(static_cast<size_t>(n));
        }
        return true;
    }
    void half_close() const { ::shutdown(fd.get(), SHUT_WR); }
    /// The next close of this end is a reset.
    void reset() {
        const struct linger hard = {1, 0};
        ::setsockopt(fd.get(), SOL_SOCKET, SO_LINGER, &hard, sizeof hard);
        fd.reset();
    }
    bool readable(std::chrono::milliseconds limit) const {
        pollfd waiting{fd.get(), POLLIN, 0};
        return ::poll(&waiting, 1, static_cast<int>(limit.count())) > 0;
    }

    bool was_reset = false;  // of the last read_...
    /// Reads until `stop` says so, the peer closes, or time is up (then "TIMEOUT" is appended).
    string read_until(const std::function<bool(const string&)>& stop,
                      std::chrono::milliseconds limit = 10s) {
        string text;
        const Time end = Clock::now() + limit;
        while (!stop(text)) {
            const auto left =
                std::chrono::duration_cast<std::chrono::milliseconds>(end - Clock::now());
            if (left.count() <= 0 || !readable(left)) { return text + "TIMEOUT"; }
            char buffer[65536];
            const ssize_t n = ::recv(fd.get(), buffer, sizeof buffer, 0);
            was_reset = n < 0;
            if (n <= 0) { break; }
            text.append(buffer, static_cast<size_t>(n));
        }
        return text;
    }
    string read_all(std::chrono::milliseconds limit = 10s) {
        return read_until([](const string&) { return false; }, limit);
    }
};

/// A response, taken apart; chunks are joined and `whole` tells whether the body was complete.
struct Reply {
    string raw, version, head, body;
    int status = 0;
    map<string, string> fields;  // by lower-case name
    bool whole = true;

    explicit Reply(string bytes) : raw(std::move(bytes)) {
        const size_t end = raw.find("\r\n\r\n");
        if (end == string::npos) {
            whole = false;
            return;
        }
        head = raw.substr(0, end + 2);
        body = raw.substr(end + 4);
        version = head.substr(0, 8);
        status = std::atoi(head.c_str() + 9);
        std::istringstream lines(head);
        string line;
        std::getline(lines, line);
        while (std::getline(lines, line)) {
            const size_t colon = line.find(':');
            string name = line.substr(0, colon);
            for (char& c : name) { c = lower(c); }
            fields[name] = string(trim(string_view(line).substr(colon + 1, line.size() - colon - 2)));
        }
        if (fields.count("transfer-encoding") != 0) { join_chunks(); }
        if (fields.count("content-length") != 0) {
            whole = body.size() == std::strtoull(fields["content-length"].c_str(), nullptr, 10);
        }
    }

    void join_chunks() {
        string joined;
        whole = false;
        for (size_t at = 0; at < body.size();) {
            const size_t size = std::strtoull(body.c_str() + at, nullptr, 16);
            at = body.find("\r\n", at) + 2;
            if (size == 0) {
                whole = body.substr(at) == "\r\n";
                break;
            }
            joined += body.substr(at, size);
            at += size + 2;
        }
        body = joined;
    }
};

/// One request as raw bytes, and what came back.
Reply request(int port, string_view bytes, std::chrono::milliseconds limit = 10s) {
    Client client(port);
    client.send(bytes);
    return Reply(client.read_all(limit));
}

Reply get(const Server& server, const string& target = "/",
          std::chrono::milliseconds limit = 10s) {
    return request(server.port(), "GET " + target + " HTTP/1.1\r\nHost: x\r\n\r\n", limit);
}

Reply post(const Server& server, const string& target, const string& body) {
    return request(server.port(), "POST " + target + " HTTP/1.1\r\nHost: x\r\nContent-Length: " +
                                      to_string(body.size()) + "\r\n\r\n" + body);
}

/// Says hello; most tests of the server itself need no more.
constexpr const char* kHello = R"py(
def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "6")])
    return [b"hello\n"]
)py";

TEST_CASE("a GET is answered") {
    const Server server(kHello);
    const Reply reply = get(server);
    CHECK(reply.status == 200);
    CHECK(reply.body == "hello\n");
}
// --- Flask and Django -----------------------------------------------------------------------

constexpr const char* kFlask = R"py(
import hashlib
from flask import Flask, Response, request, send_file
app = Flask(__name__)

@app.route("/")
def hello():
    return "Hello from Flask"

@app.route("/form", methods=["POST"])
def form():
    return "%s is %s" % (request.form["name"], request.form["colour"])

@app.route("/upload", methods=["POST"])
def upload():
    return hashlib.sha256(request.files["file"].read()).hexdigest()

@app.route("/stream")
def stream():
    return Response(("line %d\n" % i for i in range(1000)), mimetype="text/plain")

@app.route("/file")
def file():
    return send_file("/usr/bin/python3", mimetype="application/octet-stream")
)py";

constexpr const char* kDjango = R"py(
import hashlib
from django.conf import settings
settings.configure(DEBUG=False, ALLOWED_HOSTS=["*"], ROOT_URLCONF=__name__, SECRET_KEY="k",
                   DATA_UPLOAD_MAX_MEMORY_SIZE=10**8)
from django.core.wsgi import get_wsgi_application
from django.http import FileResponse, HttpResponse, StreamingHttpResponse
from django.urls import path

def hello(request):
    return HttpResponse("Hello from Django")

def form(request):
    return HttpResponse("%s is %s" % (request.POST["name"], request.POST["colour"]))

def upload(request):
    return HttpResponse(hashlib.sha256(request.FILES["file"].read()).hexdigest())

def stream(request):
    return StreamingHttpResponse("line %d\n" % i for i in range(1000))

def file(request):
    return FileResponse(open("/usr/bin/python3", "rb"))

urlpatterns = [path("", hello), path("form", form), path("upload", upload),
               path("stream", stream), path("file", file)]
app = get_wsgi_application()
)py";

/// What a shell command prints, without the last line break.
string output_of(const string& command) {
    const std::unique_ptr<FILE, int (*)(FILE*)> pipe(::popen(command.c_str(), "r"), ::pclose);
    string text;
    char buffer[4096];
    while (const size_t n = std::fread(buffer, 1, sizeof buffer, pipe.get())) {
        text.append(buffer, n);
    }
    while (!text.empty() && text.back() == '\n') { text.pop_back(); }
    return text;
}

TEST_CASE("Flask and Django applications run under two workers") {
    const std::pair<const char*, const char*> frameworks[] = {{"Flask", kFlask},
                                                              {"Django", kDjango}};
    for (const auto& [name, source] : frameworks) {
        CAPTURE(name);
        const Server server(source, {"-w", "2", "-k", "sync"});
        CHECK(get(server).body == string("Hello from ") + name);

        const string form = "name=Ada+Lovelace&colour=blue";
        const Reply posted = request(
            server.port(), "POST /form HTTP/1.1\r\nHost: x\r\nContent-Type: "
                           "application/x-www-form-urlencoded\r\nContent-Length: " +
                               to_string(form.size()) + "\r\n\r\n" + form);
        CHECK(posted.body == "Ada Lovelace is blue");

        string upload(5'000'000, '\0');
        for (size_t i = 0; i < upload.size(); ++i) { upload[i] = static_cast<char>(i * i >> 7); }
        write_file(server.dir.path + "/upload", upload);
        const string url = "http://127.0.0.1:" + to_string(server.port());
        CHECK(output_of("curl -s -F file=@" + server.dir.path + "/upload " + url + "/upload") ==
              output_of("sha256sum < " + server.dir.path + "/upload | cut -d' ' -f1"));

        const Reply streamed = get(server, "/stream");
        CHECK(streamed.whole);
        CHECK(count(streamed.body, "\n") == 1000);

        const Reply file = get(server, "/file");
        CHECK(file.whole);
        CHECK(file.body == read_file("/usr/bin/python3"));
    }
}


}  // namespace test

int main(int argc, char** argv) {
    ::signal(SIGPIPE, SIG_IGN);
    doctest::Context context(argc, argv);
    return context.run();
}
