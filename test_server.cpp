// test_server.cpp: unit tests of the pure parts of server.cpp, and end-to-end tests of ./server.
//
//   make test                        everything, in the shares of main()
//   ./test_server -tc='*reload*'     what matches
//   ./test_server -ts=http           a part: grep TEST_SUITE_BEGIN test_server.cpp
//
// An end-to-end test starts the real program ($SERVER, ./server by default) on port 0 with an
// application of its own, talks to it over real sockets, and leaves no process behind.
#ifdef FUZZ  // make fuzz: not the tests, but a target for libFuzzer

#define main server_main
#include "server.cpp"
#undef main

namespace fuzz {

void require(bool holds) {
    if (!holds) { std::abort(); }
}

/// Feeds bytes to a parser `step` at a time; what it made of them, as one string.
string read_request(string_view bytes, size_t step) {
    static const Config config;
    RequestParser parser(config);
    string in, body;
    for (size_t fed = 0;;) {
        in += bytes.substr(fed, step);
        fed = std::min(fed + step, bytes.size());
        const std::vector<char> block(in.begin(), in.end());  // exact: a read past it is seen
        string_view left(block.data(), block.size()), piece;
        Parse parsed;
        while ((parsed = parser.next(left, piece)) == Parse::Data || parsed == Parse::Head) {
            if (parsed == Parse::Data) { body += piece; }
        }
        if (parsed == Parse::Bad) { return "bad " + to_string(parser.error.code); }
        if (parsed == Parse::Done || fed == bytes.size()) {
            const bool done = parsed == Parse::Done;
            const string block_of = make_environ(parser.request, {"1.2.3.4", "80", "", ""});
            return string(done ? "done " : "more ") + to_string(done ? fed - left.size() : 0) +
                   '\0' + (done ? block_of : "") + '\0' + body;
        }
        in = string(left);
    }
}

/// A request means the same however it arrives, and its frame can be taken apart again.
void requests(string_view bytes, size_t step) {
    const string whole = read_request(bytes, std::max<size_t>(bytes.size(), 1));
    require(whole == read_request(bytes, step));
    if (whole.compare(0, 5, "done ") != 0) { return; }
    string_view rest = string_view(whole).substr(whole.find('\0') + 1);
    require(rest.substr(0, 15) == string_view("CONTENT_LENGTH\0", 15));
    size_t names = 0;
    for (; !rest.empty() && rest.front() != '\0'; ++names) {
        const string_view name = cut(rest, '\0'), value = cut(rest, '\0');
        require(!name.empty() && is_made_of(name, "!#$%&'*+-.^_`|~"));
        require(name == "PATH_INFO" || is_field_value(value));
        require(name != "HTTP_PROXY" && name != "HTTP_CONTENT_LENGTH");
    }
    require(names >= 12);
}

/// A PROXY header means the same however it arrives, and names an address or nothing.
void proxy_headers(string_view bytes) {
    Endpoints whole, parts;
    string_view in = bytes;
    const Parse expected = take_proxy_header(in, whole);
    Parse parsed = Parse::NeedMore;
    for (size_t fed = 1; fed <= bytes.size() && parsed == Parse::NeedMore; ++fed) {
        string_view part = bytes.substr(0, fed);
        parsed = take_proxy_header(part, parts);
    }
    require(parsed == expected && whole.peer == parts.peer && whole.peer_port == parts.peer_port);
    Network network;
    require(whole.peer.empty() ||
            (is_made_of(whole.peer, ".:") && parse_network(whole.peer, network)));
}

/// What is accepted of an application's head goes out as lines of one kind only.
void responses(string_view bytes) {
    Response response;
    if (parse_response(bytes, response)) { return; }
    string_view head = response.fields;
    while (!head.empty()) {
        const string_view line = cut(head, '\n');
        require(!line.empty() && line.back() == '\r' &&
                is_field_value(line.substr(0, line.size() - 1)));
    }
    require(is_field_value(response.line) && response.status >= 200 && response.status <= 999);
}

string read_frames(string_view bytes, size_t step) {
    NetstringReader reader;
    string events;
    for (size_t at = 0; at < bytes.size(); at += step) {
        const string_view part = bytes.substr(at, step);
        const std::vector<char> block(part.begin(), part.end());
        string_view in(block.data(), block.size()), piece;
        for (auto event = NetstringReader::Event::Piece;
             event != NetstringReader::Event::NeedMore;) {
            event = reader.next(in, piece);
            if (event == NetstringReader::Event::Bad) { return events + "bad"; }
            if (event == NetstringReader::Event::Piece) { events += piece; }
            if (event == NetstringReader::Event::End) { events += "<end>"; }
            if (event == NetstringReader::Event::Failed) { events += "<failed>"; }
            if (event == NetstringReader::Event::Whole) { events += "<whole>"; }
        }
    }
    return events;
}

/// A line of the access log is one line, whatever a client sent and however the format looks.
void access_lines(string_view bytes) {
    const string block = "HTTP_AUTHORIZATION" + string(1, '\0') + "Basic " + string(bytes) +
                         string(1, '\0') + "PATH_INFO" + string(1, '\0') + string(bytes);
    const string format(bytes.substr(0, bytes.find_first_of("\r\n")));
    Access access;
    access.env = access.head = block;
    access.line = access.peer = bytes;
    for (const string& each : {format, string("%(h)s %(u)s %(r)s %(U)s %({x}o)s %(L)s")}) {
        const string line = access_line(each, access);
        require(line.find('\n') == line.size() - 1);
    }
}

}  // namespace fuzz

/// The first byte chooses the part, the second the size of the pieces, the rest is the input.
extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, size_t size) {
    if (size < 2) { return 0; }
    const size_t step = data[1] % 32 + 1U;
    const string_view bytes(reinterpret_cast<const char*>(data) + 2, size - 2);
    switch (data[0] % 5) {
        case 0: fuzz::requests(bytes, step); break;
        case 1: fuzz::responses(bytes); break;
        case 2:
            fuzz::require(fuzz::read_frames(bytes, std::max<size_t>(bytes.size(), 1)) ==
                          fuzz::read_frames(bytes, step));
            break;
        case 3: fuzz::access_lines(bytes); break;
        case 4: fuzz::proxy_headers(bytes); break;
    }
    return 0;
}

#else

#define DOCTEST_CONFIG_IMPLEMENT
#define DOCTEST_CONFIG_NO_POSIX_SIGNALS
#define DOCTEST_CONFIG_SUPER_FAST_ASSERTS
#include <doctest/doctest.h>

#define main server_main
#include "server.cpp"
#undef main

#include <dirent.h>
#include <poll.h>
#include <sys/ptrace.h>
#include <termios.h>

#include <functional>
#include <map>
#include <optional>
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

/// The parent of a process and its state as in /proc/PID/stat; {0, ' '} when it has gone.
std::pair<pid_t, char> parent_and_state(pid_t pid) {
    const string stat = read_file("/proc/" + to_string(pid) + "/stat");
    const size_t end = stat.rfind(") ");
    if (end == string::npos) { return {0, ' '}; }
    return {std::atoi(stat.c_str() + end + 4), stat[end + 2]};
}

/// Stops a process; kill() returns before that is so.
void freeze(pid_t pid) {
    ::kill(pid, SIGSTOP);
    REQUIRE(wait_for([pid] { return parent_and_state(pid).second == 'T'; }));
}

/// The program under test: $SERVER, or ./server.
string server_path() {
    const char* given = std::getenv("SERVER");
    char path[PATH_MAX] = "";
    REQUIRE(::realpath(given != nullptr ? given : "./server", path) != nullptr);
    return path;
}

/// The same, as a word of a shell command.
string quoted_server() { return in_quotes(server_path()); }

bool is_sanitized() { return contains(server_path(), "asan"); }

/// The port of the n-th TCP listener, from the "Listening at" line of a log.
int port_in(const string& log, size_t n = 0) {
    size_t at = log.find("Listening at: ");
    for (size_t i = 0; i <= n && at != string::npos; ++i) { at = log.find("http://", at + 1); }
    if (at == string::npos) { return 0; }
    at += 7;
    at = log.find(log[at] == '[' ? "]:" : ":", at) + (log[at] == '[' ? 2 : 1);
    return std::atoi(log.c_str() + at);
}

/// A server that runs, with stdout and stderr in files.
struct Server {
    TempDir dir;
    string mark;
    pid_t pid = -1;
    int status = -1;                                  // as from waitpid, once it has ended
    static inline std::function<void()> before_exec;  // run in the child, where set

    /// Starts $SERVER with `args`, in a directory that holds `app` as app.py. The application
    /// defaults to app:app. Waits until every worker is ready, unless `wait` is false.
    explicit Server(const string& app, vector<string> args = {}, vector<string> env = {},
                    bool wait = true) {
        static int serial = 0;
        mark = "SERVER_TEST_MARK=" + to_string(::getpid()) + "." + to_string(++serial) + ";";
        write_file(dir.path + "/app.py", app);
        vector<string> words{server_path(), "--chdir", dir.path};
        const auto has = [&](const char* prefix) {
            return std::any_of(args.begin(), args.end(), [&](const string& a) {
                return a.compare(0, std::strlen(prefix), prefix) == 0;
            });
        };
        if (!has("-b") && !has("--bind")) { words.insert(words.end(), {"-b", "127.0.0.1:0"}); }
        if (!has("--access-logfile")) {
            words.insert(words.end(), {"--access-logfile", dir.path + "/access"});
        }
        if (std::find(args.begin(), args.end(), "--python") == args.end()) {
            words.insert(words.end(), {"--python", "/usr/bin/python3"});
        }
        words.insert(words.end(), args.begin(), args.end());
        if (!has("app")) { words.emplace_back("app:app"); }
        pid = ::fork();
        if (pid == 0) {
            ::setsid();
            ::putenv(mark.data());
            for (string& pair : env) { ::putenv(pair.data()); }
            const Fd out(::open((dir.path + "/out").c_str(),
                                O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644));
            const Fd err(::open((dir.path + "/err").c_str(),
                                O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644));
            ::dup2(out.get(), 1);
            ::dup2(err.get(), 2);
            if (before_exec) { before_exec(); }
            vector<char*> argv;
            for (string& word : words) { argv.push_back(word.data()); }
            argv.push_back(nullptr);
            ::execv(argv[0], argv.data());
            ::_exit(127);
        }
        REQUIRE(pid > 0);
        if (wait) {
            const bool done = wait_for([&] { return ended() || ready_workers() > 0; }, 15s);
            if (!done) { ::kill(pid, SIGKILL); }  // no destructor will
            REQUIRE_MESSAGE(done, log());
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

    int port(size_t n = 0) const { return port_in(log(), n); }

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

    /// The first of them. Waits for it: /proc shows no environment during an execve().
    pid_t worker() const {
        return first([this] { return workers(); });
    }
    pid_t runner() const {
        return first([this] { return runners(); });
    }
    template <typename List>
    static pid_t first(List list) {
        vector<pid_t> found;
        REQUIRE(wait_for([&] { return !(found = list()).empty(); }));
        return found[0];
    }

    /// How many workers say by their heartbeat that they are ready: mode bit 2 of an unlinked file.
    size_t ready_workers(pid_t master = 0) const {
        size_t ready = 0;
        const string dir_name = "/proc/" + to_string(master > 0 ? master : pid) + "/fd";
        const std::unique_ptr<DIR, int (*)(DIR*)> fds(::opendir(dir_name.c_str()), ::closedir);
        while (const dirent* entry = fds ? ::readdir(fds.get()) : nullptr) {
            struct stat info = {};
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
    static inline int receive_buffer = 0;  // of those to come; 0: the system's choice
    Fd fd;
    explicit Client(const Server& server) : Client(server.port()) {}
    explicit Client(int port) {
        sockaddr_in address{};
        address.sin_family = AF_INET;
        address.sin_port = htons(static_cast<uint16_t>(port));
        address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        fd = Fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
        if (receive_buffer > 0) {
            ::setsockopt(fd.get(), SOL_SOCKET, SO_RCVBUF, &receive_buffer, sizeof receive_buffer);
        }
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
            fields[name] =
                string(trim(string_view(line).substr(colon + 1, line.size() - colon - 2)));
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
            const size_t size = std::strtoul(body.c_str() + at, nullptr, 16);
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

Reply get(const Server& server, const string& target = "/", std::chrono::milliseconds limit = 10s) {
    return request(server.port(), "GET " + target + " HTTP/1.1\r\nHost: x\r\n\r\n", limit);
}

Reply post(const Server& server, const string& target, const string& body) {
    return request(server.port(), "POST " + target + " HTTP/1.1\r\nHost: x\r\nContent-Length: " +
                                      to_string(body.size()) + "\r\n\r\n" + body);
}

Reply request_unix(const string& path, const string& bytes) {
    Client client(path);
    client.send(bytes);
    return Reply(client.read_all());
}

/// Says hello; most tests of the server itself need no more.
constexpr const char* kHello = R"py(
def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "6")])
    return [b"hello\n"]
)py";

// --- unit tests: bytes to meaning -------------------------------------------
TEST_SUITE_BEGIN("unit");

using namespace std::string_literals;
using namespace std::string_view_literals;
using std::set;

/// A copy that fills a heap block of its own, so that ASan sees a read past either end.
struct Exact {
    std::unique_ptr<char[]> bytes;
    size_t size;
    explicit Exact(string_view text) : bytes(new char[text.size()]), size(text.size()) {
        std::copy(text.begin(), text.end(), bytes.get());
    }
    string_view view() const { return {bytes.get(), size}; }
};

/// Sets (nullptr: removes) a variable of the environment, and puts it back at the end.
struct SetEnv {
    string name, old;
    bool was_set;
    SetEnv(const char* variable, const char* value) : name(variable) {
        const char* before = std::getenv(variable);
        was_set = before != nullptr;
        old = was_set ? before : "";
        value != nullptr ? ::setenv(variable, value, 1) : ::unsetenv(variable);
    }
    ~SetEnv() { was_set ? ::setenv(name.c_str(), old.c_str(), 1) : ::unsetenv(name.c_str()); }
};

/// Numbers that look random and are the same in every run.
struct Random {
    uint32_t state = 1;
    size_t below(size_t limit) {
        state = state * 1664525U + 1013904223U;
        return (state >> 8) % limit;
    }
};

/// How far to go at a time for "byte by byte"; very long input takes 256 steps.
size_t small_step(size_t size) { return size < 4000 ? 1 : size / 256; }

constexpr int kWantsMore = -1;  // the outcome of input that ends too early

struct Outcome {
    int status;      // 0: understood; an HTTP status; kWantsMore
    string meaning;  // of what was understood
    size_t used;     // bytes that it took
    bool operator==(const Outcome& other) const {
        return status == other.status && meaning == other.meaning && used == other.used;
    }
};

/// METHOD|PATH|QUERY|PROTOCOL|fields…|length=N|chunked|expect
string meaning_of(const RequestParser& parser) {
    const Request& request = parser.request;
    const string block = make_environ(request, Endpoints{});
    const auto value = [&](const char* name) { return string(lookup(block, name)); };
    string text = value("REQUEST_METHOD") + "|" + value("PATH_INFO") + "|" + value("QUERY_STRING") +
                  "|" + value("SERVER_PROTOCOL");
    for (string_view rest = block; !rest.empty();) {
        const string name(cut(rest, '\0')), content(cut(rest, '\0'));
        if (name.compare(0, 5, "HTTP_") == 0 || name == "CONTENT_TYPE") {
            text += "|" + name + "=" + content;
        }
    }
    if (request.length >= 0) { text += "|length=" + to_string(request.length); }
    return text + (parser.at.chunked ? "|chunked" : "") +
           (request.expect_continue ? "|expect" : "");
}

/// With $FUZZ_SEEDS, the cases of the tables become the first inputs of `make fuzz`: there is a
/// file for each in that directory. The kind is that of LLVMFuzzerTestOneInput.
void seed(char kind, const string& bytes) {
    static int serial = 0;
    const char* dir = std::getenv("FUZZ_SEEDS");
    if (dir == nullptr || bytes.size() > 4096) { return; }
    write_file(string(dir) + "/" + to_string(++serial), string{kind, '\0'} + bytes);
}

/// Feeds a parser `step` bytes at a time, each time at another address, until it says `goal`. The
/// meaning is what it gave of the body.
Outcome feed(RequestParser& parser, string_view bytes, size_t step, Parse goal) {
    string in, body;
    for (size_t fed = 0;;) {
        in += bytes.substr(fed, step);
        fed = std::min(fed + step, bytes.size());
        const Exact block(in);
        string_view left = block.view(), piece;
        Parse parsed;
        while ((parsed = parser.next(left, piece)) == Parse::Data) { body += piece; }
        if (parsed == Parse::Bad) { return {parser.error.code, "", 0}; }
        if (parsed == goal) { return {0, body, fed - left.size()}; }
        if (fed == bytes.size()) { return {kWantsMore, body, 0}; }
        in = string(left);
    }
}

/// Parses a head that arrives `step` bytes at a time.
Outcome parse_head(string_view bytes, const Config& config, size_t step) {
    RequestParser parser(config);
    Outcome outcome = feed(parser, bytes, step, Parse::Head);
    if (outcome.status == 0) { outcome.meaning = meaning_of(parser); }
    return outcome;
}

/// What a whole head says.
Request request_of(string_view head) {
    const Config config;
    RequestParser parser(config);
    REQUIRE(feed(parser, head, head.size(), Parse::Head).status == 0);
    return parser.request;
}

/// The outcome of the whole head at once, which must be the one of the head byte by byte.
Outcome parse_head(string_view bytes, const Config& config = {}) {
    seed(0, string(bytes));
    const Outcome whole = parse_head(bytes, config, bytes.size());
    const Outcome slow = parse_head(bytes, config, small_step(bytes.size()));
    CHECK(whole.status == slow.status);
    CHECK(whole.meaning == slow.meaning);
    CHECK(whole.used == slow.used);
    return whole;
}

struct HeadCase {
    string title;
    string bytes;  // of a head, or what helps to make one
    int status;
    string meaning = "";
};

TEST_CASE("a request line is understood as RFC 9112 says, or refused") {
    const HeadCase cases[] = {
        {"a plain GET", "GET / HTTP/1.1", 0, "GET|/||HTTP/1.1"},
        {"HTTP/1.0", "GET / HTTP/1.0", 0, "GET|/||HTTP/1.0"},
        {"HTTP/1.2 is served as 1.1", "GET / HTTP/1.2", 0, "GET|/||HTTP/1.1"},
        {"HTTP/1.9 is served as 1.1", "GET / HTTP/1.9", 0, "GET|/||HTTP/1.1"},
        {"HTTP/2 without a minor version", "GET / HTTP/2", 505},
        {"HTTP/2.0", "GET / HTTP/2.0", 505},
        {"the preface of HTTP/2", "PRI * HTTP/2.0", 505},
        {"HTTP/0.9 with a version", "GET / HTTP/0.9", 505},
        {"HTTP/3.1", "GET / HTTP/3.1", 505},
        {"no version", "GET /", 400},
        {"no version but a blank", "GET / ", 400},
        {"an empty version", "GET / HTTP/", 400},
        {"a version of another protocol", "GET / ICAP/1.1", 400},
        {"a version in lower case", "GET / http/1.1", 400},
        {"a version of letters", "GET / HTTP/x.y", 400},
        {"a version with a letter behind", "GET / HTTP/1.1a", 400},
        {"a version with a sign", "GET / HTTP/+1.1", 400},
        {"a minor version with a sign", "GET / HTTP/1.-1", 400},
        {"no minor version", "GET / HTTP/1.", 400},
        {"a blank after the version", "GET / HTTP/1.1 ", 400},
        {"a fourth word", "GET / HTTP/1.1 x", 400},
        {"two blanks after the method", "GET  / HTTP/1.1", 400},
        {"two blanks after the target", "GET /  HTTP/1.1", 400},
        {"a blank first", " GET / HTTP/1.1", 400},
        {"a tab for a blank", "GET\t/\tHTTP/1.1", 400},
        {"a blank within the target", "GET /a b HTTP/1.1", 400},
        {"only a method", "GET", 400},
        {"a method of 3 characters", "PUT / HTTP/1.1", 0, "PUT|/||HTTP/1.1"},
        {"a method of 2 characters", "GE / HTTP/1.1", 400},
        {"a method of 20 characters", "ABCDEFGHIJKLMNOPQRST / HTTP/1.1", 0,
         "ABCDEFGHIJKLMNOPQRST|/||HTTP/1.1"},
        {"a method of 21 characters", "ABCDEFGHIJKLMNOPQRSTU / HTTP/1.1", 400},
        {"a method in lower case", "get / HTTP/1.1", 400},
        {"a method with one lower-case letter", "GeT / HTTP/1.1", 400},
        {"a method of other token characters", "M-SEARCH!#1 / HTTP/1.1", 0,
         "M-SEARCH!#1|/||HTTP/1.1"},
        {"a method that is no token", "GET( / HTTP/1.1", 400},
        {"a method with NUL", "GE\0T / HTTP/1.1"s, 400},
        {"a method with a byte above ASCII", "GET\xe9 / HTTP/1.1", 400},
        {"the start of a TLS handshake", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc"s, 400},
        {"CONNECT", "CONNECT example.org:443 HTTP/1.1", 501},
        {"CONNECT with an origin form", "CONNECT / HTTP/1.1", 501},
        {"* with OPTIONS", "OPTIONS * HTTP/1.1", 0, "OPTIONS|*||HTTP/1.1"},
        {"* with GET", "GET * HTTP/1.1", 400},
        {"* and more", "OPTIONS *x HTTP/1.1", 400},
        {"a query", "GET /a?b=c&d=%20?e HTTP/1.1", 0, "GET|/a|b=c&d=%20?e|HTTP/1.1"},
        {"an empty query", "GET /a? HTTP/1.1", 0, "GET|/a||HTTP/1.1"},
        {"a fragment is cut from the query", "GET /a?b#c HTTP/1.1", 0, "GET|/a|b|HTTP/1.1"},
        {"a fragment is cut from the path", "GET /a#b?c HTTP/1.1", 0, "GET|/a||HTTP/1.1"},
        {"two slashes first are a path", "GET //h/x HTTP/1.1", 0, "GET|//h/x||HTTP/1.1"},
        {"dots are left alone", "GET /../a/./b HTTP/1.1", 0, "GET|/../a/./b||HTTP/1.1"},
        {"escapes in the path", "GET /%41%2f%C3%a9 HTTP/1.1", 0, "GET|/A/\xc3\xa9||HTTP/1.1"},
        {"escapes of ? and # in the path", "GET /%3f%23 HTTP/1.1", 0, "GET|/?#||HTTP/1.1"},
        {"an escape is decoded once", "GET /%2541 HTTP/1.1", 0, "GET|/%41||HTTP/1.1"},
        {"escapes in the query stay", "GET /?%41%00 HTTP/1.1", 0, "GET|/|%41%00|HTTP/1.1"},
        {"malformed escapes stay", "GET /%4g%%4%zz%1 HTTP/1.1", 0, "GET|/%4g%%4%zz%1||HTTP/1.1"},
        {"a plus sign stays", "GET /a+b HTTP/1.1", 0, "GET|/a+b||HTTP/1.1"},
        {"%00 in the path", "GET /a%00b HTTP/1.1", 400},
        {"NUL in the path", "GET /a\0b HTTP/1.1"s, 400},
        {"NUL in the query", "GET /?\0 HTTP/1.1"s, 400},
        {"a control character in the target", "GET /\x01 HTTP/1.1", 400},
        {"ESC in the target", "GET /\x1b[31m HTTP/1.1", 400},
        {"DEL in the target", "GET /\x7f HTTP/1.1", 400},
        {"a tab in the target", "GET /a\tb HTTP/1.1", 400},
        {"a lone CR in the target", "GET /a\rb HTTP/1.1", 400},
        {"bytes above ASCII in the target", "GET /\xff\xe9?\x80 HTTP/1.1", 0,
         "GET|/\xff\xe9|\x80|HTTP/1.1"},
        {"absolute form", "GET http://h:81/a?b HTTP/1.1", 0, "GET|/a|b|HTTP/1.1|HTTP_HOST=h:81"},
        {"absolute form in capitals", "GET HTTP://H/ HTTP/1.1", 0, "GET|/||HTTP/1.1|HTTP_HOST=H"},
        {"absolute form with https", "GET https://h/ HTTP/1.1", 0, "GET|/||HTTP/1.1|HTTP_HOST=h"},
        {"absolute form with an IPv6 host", "GET http://[::1]:8/ HTTP/1.1", 0,
         "GET|/||HTTP/1.1|HTTP_HOST=[::1]:8"},
        {"absolute form without a path", "GET http://h HTTP/1.1", 0, "GET|/||HTTP/1.1|HTTP_HOST=h"},
        {"absolute form with only a query", "GET http://h?q HTTP/1.1", 0,
         "GET|/|q|HTTP/1.1|HTTP_HOST=h"},
        {"absolute form with user information", "GET http://user@h/ HTTP/1.1", 400},
        {"absolute form with a password", "GET http://user:pw@h/ HTTP/1.1", 400},
        {"absolute form without a host", "GET http:///a HTTP/1.1", 400},
        {"absolute form with a bad port", "GET http://h:x/ HTTP/1.1", 400},
        {"absolute form of another scheme", "GET ftp://h/ HTTP/1.1", 400},
        {"authority form without CONNECT", "GET h:80 HTTP/1.1", 400},
        {"a path without a slash", "GET a HTTP/1.1", 400},
        {"a query without a path", "GET ?a HTTP/1.1", 400},
    };
    for (const HeadCase& row : cases) {
        CAPTURE(row.title);
        const Outcome outcome = parse_head(row.bytes + "\r\n\r\n");
        CHECK(outcome.status == row.status);
        CHECK(outcome.meaning == row.meaning);
    }
}

TEST_CASE("header fields reach the environ as RFC 9112 and PEP 3333 say, or are refused") {
    const HeadCase cases[] = {
        {"no field", "", 0},
        {"a field", "Accept: a/b\r\n", 0, "|HTTP_ACCEPT=a/b"},
        {"white space around a value", "A:  \t b \tc \t \r\n", 0, "|HTTP_A=b \tc"},
        {"no white space before a value", "A:b\r\n", 0, "|HTTP_A=b"},
        {"an empty value", "A:\r\nB:  \r\n", 0, "|HTTP_A=|HTTP_B="},
        {"a colon in a value", "A: b:c\r\n", 0, "|HTTP_A=b:c"},
        {"a name of all token characters", "!#$%&'*+-.^`|~09azAZ: 1\r\n", 0,
         "|HTTP_!#$%&'*+_.^`|~09AZAZ=1"},
        {"bytes above ASCII in a value", "A: \xe9\xff\x80\r\n", 0, "|HTTP_A=\xe9\xff\x80"},
        {"repeated fields are joined", "A: 1\r\nB: 2\r\na: 3\r\n", 0, "|HTTP_A=1,3|HTTP_B=2"},
        {"repeated empty fields are joined", "A:\r\nA:\r\nA: 1\r\n", 0, "|HTTP_A=,,1"},
        {"each with its own, and all sorted",
         "A: 1\r\nBB: 2\r\nC:\r\nb: 3\r\nbb: 4\r\na: 5\r\nc: 6\r\nBb: 7\r\nA: 8\r\n", 0,
         "|HTTP_A=1,5,8|HTTP_B=3|HTTP_BB=2,4,7|HTTP_C=,6"},
        {"cookies are joined with ;", "Cookie: a=1\r\ncookie: b=2\r\n", 0, "|HTTP_COOKIE=a=1; b=2"},
        {"Content-Type without HTTP_", "Content-Type: text/plain\r\n", 0,
         "|CONTENT_TYPE=text/plain"},
        {"two Content-Types", "Content-Type: a/b\r\ncontent-type: a/b\r\n", 400},
        {"a name with _ is dropped", "A_B: 1\r\nX: 2\r\n", 0, "|HTTP_X=2"},
        {"a name with _ cannot imitate one with -", "A-B: 1\r\nA_B: 2\r\n", 0, "|HTTP_A_B=1"},
        {"Content_Length is dropped", "Content_Length: 5\r\n", 0, ""},
        {"Transfer_Encoding is dropped", "Transfer_Encoding: x\r\n", 0, ""},
        {"Proxy never becomes HTTP_PROXY", "Proxy: evil\r\nPROXY: evil\r\n", 0, ""},
        {"Proxy-Authorization is no Proxy", "Proxy-Authorization: x\r\n", 0,
         "|HTTP_PROXY_AUTHORIZATION=x"},
        {"a dropped field is checked all the same", "A_B: \x01\r\n", 400},
        {"a dropped Proxy is checked all the same", "Proxy : x\r\n", 400},
        {"obs-fold with a blank", "A: b\r\n c\r\n", 400},
        {"obs-fold with a tab", "A: b\r\n\tc: d\r\n", 400},
        {"a blank before the first field", " A: b\r\n", 400},
        {"a line of blanks", "A: b\r\n  \r\n", 400},
        {"a blank before the colon", "A : b\r\n", 400},
        {"a tab before the colon", "A\t: b\r\n", 400},
        {"a blank within the name", "A B: c\r\n", 400},
        {"an empty name", ": b\r\n", 400},
        {"no colon", "A\r\n", 400},
        {"a name with a slash", "A/B: c\r\n", 400},
        {"a name in quotes", "\"A\": c\r\n", 400},
        {"a name with a byte above ASCII", "\xc3\xa9: c\r\n", 400},
        {"a name with NUL", "A\0: c\r\n"s, 400},
        {"a lone CR in a field value is refused", "A: b\rc\r\n", 400},
        {"a CR before CRLF is refused", "A: b\r\r\n", 400},
        {"a bare LF ends no field", "A: b\nC: d\r\n", 400},
        {"a bare LF ends no head", "A: b\r\n\n", 400},
        {"NUL in a value", "A: b\0c\r\n"s, 400},
        {"a control character in a value", "A: \x02\r\n", 400},
        {"a vertical tab before a value",
         "A: \x0b"
         "b\r\n",
         400},
        {"DEL in a value", "A: \x7f\r\n", 400},
        // Host
        {"a host", "Host: example.org\r\n", 0, "|HTTP_HOST=example.org"},
        {"a host with a port", "Host: example.org:8000\r\n", 0, "|HTTP_HOST=example.org:8000"},
        {"an empty host", "Host:\r\n", 0, "|HTTP_HOST="},
        {"two Hosts", "Host: a\r\nHost: a\r\n", 400},
        {"an empty Host and another", "Host:\r\nHost: a\r\n", 400},
        {"a Host that is a list", "Host: a b\r\n", 400},
        {"a Host with user information", "Host: u@h\r\n", 400},
        {"a Host with a path", "Host: h/x\r\n", 400},
        {"a Host with a bad port", "Host: h:8o\r\n", 400},
        // Content-Length
        {"a Content-Length", "Content-Length: 5\r\n", 0, "|length=5"},
        {"a Content-Length of 0", "Content-Length: 0\r\n", 0, "|length=0"},
        {"the largest Content-Length", "Content-Length: 9223372036854775807\r\n", 0,
         "|length=9223372036854775807"},
        {"a Content-Length of more than 63 bits", "Content-Length: 9223372036854775808\r\n", 400},
        {"a Content-Length of 64 bits", "Content-Length: 18446744073709551621\r\n", 400},
        {"a very long Content-Length", "Content-Length: " + string(200, '9') + "\r\n", 400},
        {"an empty Content-Length", "Content-Length:\r\n", 400},
        {"a Content-Length with a plus", "Content-Length: +5\r\n", 400},
        {"a Content-Length with a minus", "Content-Length: -5\r\n", 400},
        {"minus zero", "Content-Length: -0\r\n", 400},
        {"a Content-Length list", "Content-Length: 5, 5\r\n", 400},
        {"a blank in a Content-Length", "Content-Length: 5 5\r\n", 400},
        {"a hexadecimal Content-Length", "Content-Length: 0x5\r\n", 400},
        {"a Content-Length with a letter", "Content-Length: 5a\r\n", 400},
        {"a Content-Length with an underscore", "Content-Length: 1_0\r\n", 400},
        {"a Content-Length with a fraction", "Content-Length: 5.0\r\n", 400},
        {"two equal Content-Lengths", "Content-Length: 5\r\nContent-Length: 5\r\n", 400},
        {"two Content-Lengths", "Content-Length: 5\r\nContent-length: 6\r\n", 400},
        // Transfer-Encoding
        {"chunked", "Transfer-Encoding: chunked\r\n", 0, "|chunked"},
        {"chunked in capitals", "TRANSFER-ENCODING: CHUNKED\r\n", 0, "|chunked"},
        {"chunked twice", "Transfer-Encoding: chunked, chunked\r\n", 400},
        {"chunked twice in two fields",
         "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", 400},
        {"chunked not last", "Transfer-Encoding: chunked, gzip\r\n", 400},
        {"chunked not last in two fields",
         "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n", 400},
        {"another coding", "Transfer-Encoding: gzip\r\n", 501},
        {"another coding before chunked", "Transfer-Encoding: gzip, chunked\r\n", 501},
        {"the old identity", "Transfer-Encoding: identity\r\n", 501},
        {"a coding that only begins like chunked", "Transfer-Encoding: chunkedx\r\n", 501},
        {"an empty coding", "Transfer-Encoding:\r\n", 400},
        {"a comma before chunked", "Transfer-Encoding: , chunked\r\n", 400},
        {"a comma after chunked", "Transfer-Encoding: chunked,\r\n", 400},
        {"chunked and an empty field", "Transfer-Encoding: chunked\r\nTransfer-Encoding:\r\n", 400},
        {"an empty field and chunked", "Transfer-Encoding:\r\nTransfer-Encoding: chunked\r\n", 400},
        {"two words", "Transfer-Encoding: x chunked\r\n", 400},
        {"chunked in quotes", "Transfer-Encoding: \"chunked\"\r\n", 400},
        {"a parameter of chunked", "Transfer-Encoding: chunked;q=1\r\n", 400},
        {"a vertical tab before chunked",
         "Transfer-Encoding: \x0b"
         "chunked\r\n",
         400},
        {"chunked after a Content-Length", "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
         400},
        {"chunked before a Content-Length", "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
         400},
        {"chunked with a Content-Length of 0",
         "Content-Length: 0\r\nTransfer-Encoding: chunked\r\n", 400},
        // Expect
        {"100-continue", "Expect: 100-continue\r\nContent-Length: 1\r\n", 0,
         "|HTTP_EXPECT=100-continue|length=1|expect"},
        {"100-continue in capitals", "Expect: 100-Continue\r\n", 0,
         "|HTTP_EXPECT=100-Continue|expect"},
        {"no expectation in the list", "Expect: \r\n", 0, "|HTTP_EXPECT="},
        {"another expectation", "Expect: 200-ok\r\n", 417},
        {"100-continue and another", "Expect: 100-continue, x\r\n", 417},
    };
    for (const HeadCase& row : cases) {
        CAPTURE(row.title);
        const Outcome outcome = parse_head("GET / HTTP/1.1\r\n" + row.bytes + "\r\n");
        CHECK(outcome.status == row.status);
        CHECK(outcome.meaning == (row.status == 0 ? "GET|/||HTTP/1.1" + row.meaning : ""));
    }
}

TEST_CASE("a head is a head only as a whole") {
    const HeadCase cases[] = {
        {"one empty line first is skipped", "\r\nGET / HTTP/1.1\r\n\r\n", 0, "GET|/||HTTP/1.1"},
        {"two empty lines first", "\r\n\r\nGET / HTTP/1.1\r\n\r\n", 400},
        {"a bare LF first", "\nGET / HTTP/1.1\r\n\r\n", 400},
        {"a bare LF after the request line", "GET / HTTP/1.1\n\r\n", 400},
        {"nothing but bare LFs", "GET / HTTP/1.1\n\n", 400},
        {"nothing at all", "", kWantsMore},
        {"half a request line", "GET / HT", kWantsMore},
        {"no empty line", "GET / HTTP/1.1\r\nA: b\r\n", kWantsMore},
        {"half an empty line", "GET / HTTP/1.1\r\nA: b\r\n\r", kWantsMore},
        {"only an empty line", "\r\n", kWantsMore},
        {"a bad field before the end has come", "GET / HTTP/1.1\r\nA\r\n", 400},
        {"bytes behind it stay", "GET / HTTP/1.1\r\n\r\nGET /b", 0, "GET|/||HTTP/1.1"},
        {"an empty line behind it stays", "GET / HTTP/1.1\r\n\r\n\r\n", 0, "GET|/||HTTP/1.1"},
        {"chunked on 1.0", "PUT / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 400},
        {"gzip on 1.0", "PUT / HTTP/1.0\r\nTransfer-Encoding: gzip\r\n\r\n", 400},
        {"chunked on 1.2", "PUT / HTTP/1.2\r\nTransfer-Encoding: chunked\r\n\r\n", 0,
         "PUT|/||HTTP/1.1|chunked"},
        {"100-continue on 1.0 is not answered", "PUT / HTTP/1.0\r\nExpect: 100-continue\r\n\r\n", 0,
         "PUT|/||HTTP/1.0|HTTP_EXPECT=100-continue"},
        {"the host of the target wins", "GET http://a/ HTTP/1.1\r\nX: 1\r\nHost: b\r\n\r\n", 0,
         "GET|/||HTTP/1.1|HTTP_HOST=a|HTTP_X=1"},
        {"a bad Host beside the host of the target", "GET http://a/ HTTP/1.1\r\nHost: b c\r\n\r\n",
         400},
        {"no Host on 1.1 is served", "GET / HTTP/1.1\r\nX: 1\r\n\r\n", 0,
         "GET|/||HTTP/1.1|HTTP_X=1"},
    };
    for (const HeadCase& row : cases) {
        CAPTURE(row.title);
        const Outcome outcome = parse_head(row.bytes);
        CHECK(outcome.status == row.status);
        CHECK(outcome.meaning == row.meaning);
        if (outcome.status == 0) { CHECK(outcome.used == row.bytes.find("\r\n\r\n") + 4); }
    }
}

TEST_CASE("the limits on a head hold to the byte") {
    const auto line = [](size_t size) {  // of a request line
        return "GET /" + string(size - 14, 'a') + " HTTP/1.1\r\n";
    };
    const auto field = [](size_t size) { return "A: " + string(size - 3, 'b') + "\r\n"; };
    const auto repeat = [](size_t n, const string& text) {
        string all;
        for (size_t i = 0; i < n; ++i) { all += text; }
        return all;
    };
    Config normal, config, unlimited, wide;
    config.limit_request_line = 50;
    config.limit_request_field_size = 40;
    config.limit_request_fields = 3;
    unlimited.limit_request_line = 0;
    wide.limit_request_field_size = 1 << 20;
    wide.limit_request_fields = 32768;
    const string start = "GET / HTTP/1.1\r\n";
    const struct {
        string title;
        const Config& config;
        string bytes;
        int status;
    } cases[] = {
        {"a request line at its limit", config, line(50) + "\r\n", 0},
        {"a request line over its limit", config, line(51) + "\r\n", 414},
        {"a request line over its limit that does not end", config, string(51, 'A'), 414},
        {"a request line at the default limit", normal, line(4094) + "\r\n", 0},
        {"a request line over the default limit", normal, line(4095) + "\r\n", 414},
        {"a field at its limit", config, start + field(40) + "\r\n", 0},
        {"a field over its limit", config, start + field(41) + "\r\n", 431},
        {"a field over its limit that does not end", config, start + string(41, 'A'), 431},
        {"a field at the default limit", normal, start + field(8190) + "\r\n", 0},
        {"a field over the default limit", normal, start + field(8191) + "\r\n", 431},
        {"as many fields as allowed", config, start + repeat(3, "A: b\r\n") + "\r\n", 0},
        {"one field more", config, start + repeat(4, "A: b\r\n") + "\r\n", 431},
        {"dropped fields count", config, start + repeat(4, "A_B: c\r\n") + "\r\n", 431},
        {"100 fields by default", normal, start + repeat(100, "A: b\r\n") + "\r\n", 0},
        {"101 fields by default", normal, start + repeat(101, "A: b\r\n") + "\r\n", 431},
        {"0: no limit on the request line", unlimited, line(1000000) + "\r\n", 0},
        {"but for the cap on the head", unlimited, line((1 << 20) + 2), 414},
        {"the cap on the head also holds for fields", wide,
         start + repeat(12, field(100000)) + "\r\n", 431},
        {"a field above gunicorn's largest", wide, start + field(100000) + "\r\n", 0},
    };
    for (const auto& row : cases) {
        CAPTURE(row.title);
        CHECK(parse_head(row.bytes, row.config).status == row.status);
    }
}

TEST_CASE("whatever bytes come, a head read byte by byte means what it means whole") {
    const string seeds[] = {
        "GET /a%20b?c=d HTTP/1.1\r\nHost: x:80\r\nCookie: a=b\r\nA-B: \tc \r\n\r\n",
        "POST http://h/ HTTP/1.1\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n",
        "PUT / HTTP/1.0\r\nContent-Length: 12\r\nContent-Type: a/b\r\n\r\nbody",
    };
    static constexpr char kBytes[] = "\r\n\r\n \t:,;%?#*/019aZ_-\x7f\x80\xff\x01";
    Config config;
    config.limit_request_line = 60;
    config.limit_request_field_size = 50;
    config.limit_request_fields = 4;
    Random random;
    int good = 0, bad = 0, differ = 0;
    for (int round = 0; round < 1500; ++round) {
        string bytes = seeds[random.below(3)];
        for (size_t edits = random.below(3); edits-- > 0;) {
            const size_t at = random.below(bytes.size());
            const string one(1, kBytes[random.below(sizeof kBytes)]);  // its NUL as well
            bytes.replace(at, random.below(2), random.below(8) != 0 ? one : bytes.substr(at));
        }
        const Outcome whole = parse_head(bytes, config, bytes.size());
        const Outcome slow = parse_head(bytes, config, 1);
        (whole.status == 0 ? good : bad) += 1;
        if (!(whole == slow)) {
            ++differ;
            INFO(escape(bytes));
            CHECK(whole.status == slow.status);
            CHECK(whole.meaning == slow.meaning);
        }
    }
    CHECK(differ == 0);
    CHECK(good > 300);
    CHECK(bad > 300);
}

/// Reads a body that arrives `step` bytes at a time behind a head with this field.
Outcome read_body(const string& framing, string_view bytes, const Config& config, size_t step) {
    Config current;  // the limits under test are for the body
    RequestParser parser(current);
    const string head = "POST / HTTP/1.1\r\n" + framing + "\r\n\r\n";
    REQUIRE(feed(parser, head, head.size(), Parse::Head).status == 0);
    current = config;
    return feed(parser, bytes, step, Parse::Done);
}

constexpr const char* kChunked = "Transfer-Encoding: chunked";

TEST_CASE("a body is read by its framing, whole or byte by byte") {
    struct BodyCase {
        string title;
        string framing, bytes;
        int status;
        string body = "";
        size_t rest = 0;  // bytes behind the body, which stay
    };
    const string line_at_limit = "1;" + string(8190, 'x');
    const BodyCase cases[] = {
        {"no body", "A: b", "", 0},
        {"no body, and bytes behind the head", "A: b", "GET", 0, "", 3},
        {"a Content-Length of 0", "Content-Length: 0", "GET", 0, "", 3},
        {"a Content-Length", "Content-Length: 5", "hello", 0, "hello"},
        {"more than its Content-Length", "Content-Length: 5", "hello, world", 0, "hello", 7},
        {"less than its Content-Length", "Content-Length: 5", "hell", kWantsMore, "hell"},
        {"any bytes", "Content-Length: 6", "\r\n\0\xff:,"s, 0, "\r\n\0\xff:,"s},
        {"a Content-Length of 63 bits", "Content-Length: 9223372036854775807", "a", kWantsMore,
         "a"},
        {"no chunk", kChunked, "0\r\n\r\n", 0},
        {"one chunk", kChunked, "5\r\nhello\r\n0\r\n\r\n", 0, "hello"},
        {"chunks", kChunked, "3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n", 0, "hello"},
        {"bytes behind the chunks", kChunked, "1\r\na\r\n0\r\n\r\nGET /", 0, "a", 5},
        {"a chunk that looks like the end", kChunked, "5\r\n0\r\n\r\n\r\n0\r\n\r\n", 0,
         "0\r\n\r\n"},
        {"hexadecimal in both cases", kChunked, "a\r\n0123456789\r\nB\r\n0123456789a\r\n0\r\n\r\n",
         0, "01234567890123456789a"},
        {"zeros before the size", kChunked, "0000000000000002\r\nab\r\n0000\r\n\r\n", 0, "ab"},
        {"a size of 17 digits", kChunked, "00000000000000002\r\nab\r\n0\r\n\r\n", 400},
        {"a size of 63 bits", kChunked, "7fffffffffffffff\r\na", kWantsMore, "a"},
        {"a size of 64 bits", kChunked, "8000000000000000\r\na", 400},
        {"the largest size of 16 digits", kChunked, "ffffffffffffffff\r\na", 400},
        {"an empty size", kChunked, "\r\n", 400},
        {"only an extension", kChunked, ";a\r\n", 400},
        {"a blank before the size", kChunked, " 1\r\na\r\n0\r\n\r\n", 400},
        {"a blank before an extended size", kChunked, " 1;a\r\na\r\n0\r\n\r\n", 400},
        {"a blank after a size without an extension", kChunked, "1 \r\na\r\n0\r\n\r\n", 400},
        {"a signed size", kChunked, "+1\r\na\r\n0\r\n\r\n", 400},
        {"a negative size", kChunked, "-1\r\na\r\n0\r\n\r\n", 400},
        {"a size with 0x", kChunked, "0x1\r\na\r\n0\r\n\r\n", 400},
        {"a size with an underscore", kChunked, "1_0\r\na\r\n0\r\n\r\n", 400},
        {"a size with a letter behind", kChunked, "1g\r\na\r\n0\r\n\r\n", 400},
        {"two sizes", kChunked, "1 1\r\na\r\n0\r\n\r\n", 400},
        {"an extension", kChunked, "1;a\r\nx\r\n0;b=c\r\n\r\n", 0, "x"},
        {"an extension with blanks", kChunked, "1 ; a = \"b;c\"\r\nx\r\n0\t;d\r\n\r\n", 0, "x"},
        {"an extension with a control character", kChunked, "1;\x01\r\nx\r\n0\r\n\r\n", 400},
        {"an extension with a lone CR", kChunked, "1;a\rb\r\nx\r\n0\r\n\r\n", 400},
        {"an extension with NUL", kChunked, "1;\0\r\nx\r\n0\r\n\r\n"s, 400},
        {"a chunk-size line of 8 KiB", kChunked, line_at_limit + "\r\na\r\n0\r\n\r\n", 0, "a"},
        {"a longer chunk-size line", kChunked, line_at_limit + "x\r\na\r\n0\r\n\r\n", 400},
        {"a chunk-size line without end", kChunked, line_at_limit + "xx", 400},
        {"a bare LF after a size", kChunked, "1\na\r\n0\r\n\r\n", 400},
        {"a bare CR after a size", kChunked, "1\ra\r\n0\r\n\r\n", 400},
        {"a bare LF after a chunk", kChunked, "1\r\na\n0\r\n\r\n", 400},
        {"a bare CR after a chunk", kChunked, "1\r\na\r0\r\n\r\n", 400},
        {"a chunk longer than its size", kChunked, "1\r\nab\r\n0\r\n\r\n", 400},
        {"a chunk shorter than its size", kChunked, "3\r\na\r\n0\r\n\r\n", 400},
        {"a bare LF after the last chunk", kChunked, "0\n\r\n", 400},
        {"a bare LF at the end", kChunked, "0\r\n\n", 400},
        {"no last chunk", kChunked, "1\r\na\r\n", kWantsMore, "a"},
        {"half a chunk", kChunked, "5\r\nhel", kWantsMore, "hel"},
        {"no end after the last chunk", kChunked, "1\r\na\r\n0\r\n", kWantsMore, "a"},
        {"nothing", kChunked, "", kWantsMore},
        {"trailers are dropped", kChunked, "1\r\na\r\n0\r\nA: b\r\nC:\r\n\r\nX", 0, "a", 1},
        {"a trailer without a colon", kChunked, "0\r\nA\r\n\r\n", 400},
        {"a trailer without a name", kChunked, "0\r\n: b\r\n\r\n", 400},
        {"a blank before the colon of a trailer", kChunked, "0\r\nA : b\r\n\r\n", 400},
        {"obs-fold in a trailer", kChunked, "0\r\nA: b\r\n c\r\n\r\n", 400},
        {"a bare LF after a trailer", kChunked, "0\r\nA: b\n\r\n", 400},
        {"NUL in a trailer", kChunked, "0\r\nA: \0\r\n\r\n"s, 400},
        {"a lone CR in a trailer", kChunked, "0\r\nA: b\rc\r\n\r\n", 400},
        {"Content-Length in the trailers", kChunked, "0\r\ncontent-length: 1\r\n\r\n", 400},
        {"Transfer-Encoding in the trailers", kChunked, "0\r\nTransfer-Encoding: x\r\n\r\n", 400},
        {"Host in the trailers", kChunked, "0\r\nHost: x\r\n\r\n", 400},
    };
    for (const BodyCase& row : cases) {
        CAPTURE(row.title);
        const size_t size = row.bytes.size();
        seed(0, "POST / HTTP/1.1\r\n" + row.framing + "\r\n\r\n" + row.bytes);
        const Outcome whole = read_body(row.framing, row.bytes, {}, std::max<size_t>(size, 1));
        const Outcome slow = read_body(row.framing, row.bytes, {}, small_step(size));
        CHECK(whole.status == row.status);
        CHECK(whole.meaning == row.body);
        CHECK(whole.used == (row.status == 0 ? size - row.rest : 0));
        CHECK(slow.status == whole.status);
        CHECK(slow.meaning == whole.meaning);
        CHECK(slow.used == whole.used);
    }
}

TEST_CASE("trailers obey the limits of header fields") {
    Config config;
    config.limit_request_fields = 2;
    config.limit_request_field_size = 30;
    const struct {
        string title;
        string trailers;
        int status;
    } cases[] = {
        {"as many as allowed", "A: 1\r\nB: 2\r\n", 0},
        {"one more", "A: 1\r\nB: 2\r\nC: 3\r\n", 431},
        {"as long as allowed", "A: " + string(27, 'b') + "\r\n", 0},
        {"one byte longer", "A: " + string(28, 'b') + "\r\n", 431},
    };
    for (const auto& row : cases) {
        CAPTURE(row.title);
        const string bytes = "1\r\na\r\n0\r\n" + row.trailers + "\r\n";
        for (const size_t step : {bytes.size(), size_t{1}}) {
            CHECK(read_body(kChunked, bytes, config, step).status == row.status);
        }
    }
}

TEST_CASE("whatever bytes come, chunks read byte by byte mean what they mean whole") {
    const string seed =
        "5;a=b\r\nhello\r\n3\r\n0\r\n\r\n0b ;c\r\n, the world\r\n0\r\nA: b\r\n\r\nGET";
    static constexpr char kBytes[] = "\r\n\r\n ;:0123fAg\x7f\xff";
    Config config;
    config.limit_request_field_size = 12;
    Random random;
    int good = 0, bad = 0, differ = 0;
    for (int round = 0; round < 3000; ++round) {
        string bytes = seed;
        for (size_t edits = random.below(3); edits-- > 0;) {
            const string one(1, kBytes[random.below(sizeof kBytes)]);
            bytes.replace(random.below(bytes.size()), random.below(2), one);
        }
        const Outcome whole = read_body(kChunked, bytes, config, bytes.size());
        const Outcome slow = read_body(kChunked, bytes, config, 1);
        (whole.status == 0 ? good : bad) += 1;
        if (!(whole == slow)) {
            ++differ;
            INFO(escape(bytes));
            CHECK(whole.status == slow.status);
            CHECK(whole.meaning == slow.meaning);
        }
    }
    CHECK(differ == 0);
    CHECK(good > 300);
    CHECK(bad > 300);
}

TEST_CASE("the environ block holds what PEP 3333 asks for") {
    const SetEnv no_prefix("SCRIPT_NAME", nullptr);
    const Request request = request_of(
        "POST /a%20b/\xff?c=%20#d HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n"
        "Content-Type: x/y\r\nX-Empty:\r\nX-Two: 1\r\nX-Two: 2\r\n\r\n");
    const string block = make_environ(request, {"10.0.0.1", "8000", "10.0.0.2", "50000"});
    map<string, string> found;
    size_t pairs = 0;
    for (string_view rest = block; !rest.empty(); ++pairs) {
        const string name(cut(rest, '\0'));
        found[name] = cut(rest, '\0');
    }
    const map<string, string> expected = {{"CONTENT_LENGTH", "3"},
                                          {"REQUEST_METHOD", "POST"},
                                          {"SCRIPT_NAME", ""},
                                          {"PATH_INFO", "/a b/\xff"},
                                          {"QUERY_STRING", "c=%20"},
                                          {"RAW_URI", "/a%20b/\xff?c=%20#d"},
                                          {"REQUEST_URI", "/a%20b/\xff?c=%20#d"},
                                          {"SERVER_PROTOCOL", "HTTP/1.1"},
                                          {"SERVER_NAME", "10.0.0.1"},
                                          {"SERVER_PORT", "8000"},
                                          {"REMOTE_ADDR", "10.0.0.2"},
                                          {"REMOTE_PORT", "50000"},
                                          {"HTTP_HOST", "h"},
                                          {"CONTENT_TYPE", "x/y"},
                                          {"HTTP_X_EMPTY", ""},
                                          {"HTTP_X_TWO", "1,2"}};
    for (const auto& each : expected) {
        CAPTURE(each.first);
        REQUIRE(found.count(each.first) == 1);
        CHECK(found[each.first] == each.second);
    }
    CHECK(block.compare(0, 17,
                        "CONTENT_LENGTH\0"
                        "3\0"s) == 0);  // first, as SCGI wants it
    CHECK(found.count("HTTP_CONTENT_LENGTH") == 0);
    CHECK(pairs == found.size());
    CHECK(block.back() == '\0');
}

TEST_CASE("SCRIPT_NAME is cut from PATH_INFO at a whole segment") {
    const struct {
        const char* prefix;
        string target, script_name, path_info;
    } cases[] = {
        {nullptr, "/a/b", "", "/a/b"},
        {"", "/a/b", "", "/a/b"},
        {"/a", "/a/b", "/a", "/b"},
        {"/a", "/a", "/a", ""},
        {"/a", "/a/", "/a", "/"},
        {"/a", "/ab", "", "/ab"},
        {"/a", "/", "", "/"},
        {"/a/b", "/a/b/c", "/a/b", "/c"},
        {"/a b", "/a%20b/c", "/a b", "/c"},
    };
    for (const auto& row : cases) {
        INFO("SCRIPT_NAME=", row.prefix != nullptr ? row.prefix : "", ", ", row.target);
        const SetEnv prefix("SCRIPT_NAME", row.prefix);
        const Request request = request_of("GET " + row.target + " HTTP/1.1\r\n\r\n");
        const string block = make_environ(request, {});
        CHECK(lookup(block, "SCRIPT_NAME") == row.script_name);
        CHECK(lookup(block, "PATH_INFO") == row.path_info);
        CHECK(lookup(block, "RAW_URI") == row.target);
    }
}

TEST_CASE("the environ tells an unknown length, and the name of a server on a unix socket") {
    const struct {
        string fields;
        Endpoints ends;
        string length, name, port;
    } cases[] = {
        {"Host: h:81\r\n", {"10.0.0.1", "80", "", ""}, "", "10.0.0.1", "80"},
        {"Content-Length: 0\r\n", {"10.0.0.1", "8000", "", ""}, "0", "10.0.0.1", "8000"},
        {"Host: h:81\r\n", {}, "", "h", "81"},  // a unix socket has only what Host says
        {"Host: h\r\n", {}, "", "h", "80"},
        {"Host: h:\r\n", {}, "", "h", "80"},
        {"Host: [::1]:82\r\n", {}, "", "[::1]", "82"},
        {"Host: [::1]\r\n", {}, "", "[::1]", "80"},
        {"", {}, "", "localhost", "80"},
    };
    for (const auto& row : cases) {
        CAPTURE(row.fields);
        const Request request = request_of("GET / HTTP/1.1\r\n" + row.fields + "\r\n");
        const string block = make_environ(request, row.ends);
        CHECK(block.compare(0, 15, "CONTENT_LENGTH\0"s) == 0);
        CHECK(lookup(block, "CONTENT_LENGTH") == row.length);
        CHECK(lookup(block, "SERVER_NAME") == row.name);
        CHECK(lookup(block, "SERVER_PORT") == row.port);
        const string secure = make_environ(request, row.ends, "https");
        const bool unsaid = row.ends.server.empty() && row.port == "80";
        CHECK(lookup(secure, "SERVER_PORT") == (unsaid ? "443" : row.port));
    }
}

TEST_CASE("percent_decode takes well-formed escapes only, and refuses NUL") {
    const struct {
        string text, decoded;
        bool good = true;
    } cases[] = {
        {"", ""},
        {"abc", "abc"},
        {"%41", "A"},
        {"a%2Fb%2fc", "a/b/c"},
        {"%ff%FF", "\xff\xff"},
        {"%", "%"},
        {"%4", "%4"},
        {"%4%41", "%4A"},
        {"%%41", "%A"},
        {"%g1%1g", "%g1%1g"},
        {"%2541", "%41"},
        {"%01%7f", "\x01\x7f"},
        {"%00", "", false},
        {"a%00b", "", false},
        {"%0", "%0"},
        {"%-1", "%-1"},
        {"% 1", "% 1"},
        {"%0x41", "%0x41"},
    };
    for (const auto& row : cases) {
        CAPTURE(row.text);
        const Exact block(row.text);
        string out;
        CHECK(percent_decode(block.view(), out) == row.good);
        if (row.good) { CHECK(out == row.decoded); }
    }
}

TEST_CASE("is_host knows RFC 3986's host and port") {
    const string good[] = {"",
                           "a",
                           "example.org",
                           "EXAMPLE.org.",
                           "a-b_c~d",
                           "127.0.0.1",
                           "a:80",
                           "a:",
                           ":80",
                           "[::1]",
                           "[::1]:80",
                           "[::1]:",
                           "[2001:db8::ff]:8000",
                           "[::ffff:127.0.0.1]",
                           "!$&'()*+,;=",
                           "%41b",
                           "a%2D",
                           "a:65536"};
    const string bad[] = {" ",        "a b",     "a/b",    "a?b",  "a#b",     "a@b",    "u:p@h",
                          "a:b",      "a:80:80", "a:-1",   "a:+1", "::1",     "[",      "[]",
                          "[]:80",    "[::1",    "::1]",   "a]",   "[::1]80", "[::1]x", "[::1]:x",
                          "a[::1]",   "[[::1]]", "[::1@]", "%",    "a%4",     "a%4g",   "a\\b",
                          "a\"b",     "a<b",     "a|b",    "a^b",  "a`b",     "{a}",    "\x7f",
                          "\xc3\xa9", "a\tb"};
    for (const string& text : good) {
        CAPTURE(text);
        CHECK(is_host(Exact(text).view()));
    }
    for (const string& text : bad) {
        CAPTURE(text);
        CHECK_FALSE(is_host(Exact(text).view()));
    }
    CHECK_FALSE(is_host("a\0b"sv));
}

TEST_CASE("an IP literal in a host is an IP address") {
    const string bad[] = {"[zz]", "[1]", "[::1::2]", "[12345::]", "[a.b]", "[%41]", "[127.0.0.1]"};
    for (const string& text : bad) {
        CAPTURE(text);
        CHECK_FALSE(is_host(Exact(text).view()));
    }
}

TEST_CASE("is_token knows the characters of a token") {
    const string marks = "!#$%&'*+-.^_`|~";
    for (int byte = 0; byte < 256; ++byte) {
        const char c = static_cast<char>(byte);
        const bool expected = (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') ||
                              (c >= 'A' && c <= 'Z') || marks.find(c) != string::npos;
        CAPTURE(byte);
        CHECK(is_token(Exact(string(1, c)).view()) == expected);
        CHECK(is_token(Exact("a"s + c + "b").view()) == expected);
    }
    CHECK_FALSE(is_token(""));
}

TEST_CASE("split_field cuts a field line at its first colon") {
    const struct {
        string line;
        bool good;
        string name = "", value = "";
    } cases[] = {
        {"A: b", true, "A", "b"},
        {"A:b", true, "A", "b"},
        {"a-b:\t c:d \t", true, "a-b", "c:d"},
        {"A:", true, "A", ""},
        {"A: \t", true, "A", ""},
        {"A: b\tc", true, "A", "b\tc"},
        {"A: \xff", true, "A", "\xff"},
        {"", false},
        {"A", false},
        {":", false},
        {": b", false},
        {" A: b", false},
        {"\tA: b", false},
        {"A : b", false},
        {"A B: c", false},
        {"A: b\rc", false},
        {"A: b\n", false},
        {"A: \0"s, false},
        {"A: \x1b", false},
        {"A: \x7f", false},
        {"A\0: b"s, false},
        {"\xff: b", false},
    };
    for (const auto& row : cases) {
        CAPTURE(row.line);
        const Exact block(row.line);
        string_view name, value;
        CHECK(split_field(block.view(), name, value) == row.good);
        if (row.good) {
            CHECK(name == row.name);
            CHECK(value == row.value);
        }
    }
}

TEST_CASE("parse_number reads digits and nothing else") {
    const struct {
        string text;
        int base;
        bool good;
        int64_t number = 0;
    } cases[] = {
        {"0", 10, true, 0},
        {"7", 10, true, 7},
        {"007", 10, true, 7},
        {"9223372036854775807", 10, true, INT64_MAX},
        {"9223372036854775808", 10, false},
        {"18446744073709551616", 10, false},
        {"", 10, false},
        {"-1", 10, false},
        {"-0", 10, false},
        {"-", 10, false},
        {"+1", 10, false},
        {" 1", 10, false},
        {"1 ", 10, false},
        {"1e3", 10, false},
        {"1.0", 10, false},
        {"0x1", 10, false},
        {"a", 10, false},
        {"ff", 16, true, 255},
        {"FF", 16, true, 255},
        {"7fffffffffffffff", 16, true, INT64_MAX},
        {"8000000000000000", 16, false},
        {"0x1", 16, false},
        {"g", 16, false},
        {"-1", 16, false},
    };
    for (const auto& row : cases) {
        CAPTURE(row.text);
        const Exact block(row.text);
        int64_t number = 0;
        CHECK(parse_number(block.view(), number, row.base) == row.good);
        if (row.good) { CHECK(number == row.number); }
    }
    for (int byte = 0; byte < 256; ++byte) {
        CAPTURE(byte);
        int64_t number = 0;
        const char c = static_cast<char>(byte);
        CHECK(parse_number(string(1, c), number) == (byte >= '0' && byte <= '9'));
        CHECK(parse_number(string(1, c), number, 8) == (byte >= '0' && byte <= '7'));
        CHECK(parse_number(string(1, c), number, 16) == (std::isxdigit(byte) != 0));
    }
}

TEST_CASE("the small tools for text") {
    CHECK(trim("") == "");
    CHECK(trim(" \t ") == "");
    CHECK(trim("\t a \tb ") == "a \tb");
    CHECK(trim("\ra\n") == "\ra\n");  // only blanks and tabs are optional white space

    string_view text = "a,,b";
    CHECK(cut(text, ',') == "a");
    CHECK(text == ",b");
    CHECK(cut(text, ',') == "");
    CHECK(cut(text, ',') == "b");
    CHECK(text.empty());
    CHECK(cut(text, ',') == "");
    text = "a,";
    CHECK(cut(text, ',') == "a");
    CHECK(text.empty());

    CHECK(same_name("Content-Length", "cONTENT-lENGTH"));
    CHECK(same_name("", ""));
    CHECK_FALSE(same_name("a", "ab"));
    CHECK_FALSE(same_name("ab", "a"));
    CHECK_FALSE(same_name("@", "`"));  // 32 apart, and no letters
    CHECK_FALSE(same_name("[", "{"));
    CHECK_FALSE(same_name("\xc0", "\xe0"));
}

TEST_CASE("an address to listen on has one of gunicorn's forms") {
    const string longest(sizeof(sockaddr_un::sun_path) - 1, 'p');
    struct AddressCase {
        string text;
        bool good;
        string host = "", port = "", path = "";
        int fd = -1;
        bool v6 = false;
    };
    const AddressCase cases[] = {
        {"127.0.0.1:80", true, "127.0.0.1", "80"},
        {"example.org:8080", true, "example.org", "8080"},
        {"127.0.0.1", true, "127.0.0.1", "8000"},
        {":9000", true, "", "9000"},
        {"localhost:0", true, "localhost", "0"},
        {"x:65535", true, "x", "65535"},
        {"[::1]:80", true, "::1", "80", "", -1, true},
        {"[::]", true, "::", "8000", "", -1, true},
        {"unix:/run/a.sock", true, "", "", "/run/a.sock"},
        {"unix:///run/a.sock", true, "", "", "/run/a.sock"},
        {"unix:a.sock", true, "", "", "a.sock"},
        {"unix:" + longest, true, "", "", longest},
        {"fd://3", true, "", "", "", 3},
        {"0:80", true, "0", "80"},
        {"8000", false},
        {"", false},
        {":", false},
        {"x:", false},
        {"x:65536", false},
        {"x:99999", false},
        {"x:-1", false},
        {"x:+1", false},
        {"x: 80", false},
        {"x:80 ", false},
        {"x:http", false},
        {"x:0x50", false},
        {"x:99999999999999999999", false},
        {"::1", false},
        {"::1:80", false},
        {"[::1", false},
        {"[::1]80", false},
        {"[::1]:", false},
        {"[::1]:x", false},
        {"unix:", false},
        {"unix://", false},
        {"unix:" + longest + "p", false},
        {"fd://", false},
        {"fd://x", false},
        {"fd://-1", false},
        {"fd://2147483648", false},
        {"a:b:80", false},
    };
    for (const AddressCase& row : cases) {
        CAPTURE(row.text);
        const Exact block(row.text);
        Address made;
        const Error error = parse_address(block.view(), made);
        CHECK(!error == row.good);
        if (!row.good || error) {
            CHECK(error.code == 1);
            CHECK(contains(error.text, row.text));  // a sentence that names it
            continue;
        }
        CHECK(made.path == row.path);
        CHECK(made.fd == row.fd);
        if (row.path.empty() && row.fd < 0) {
            CHECK(made.host == row.host);
            CHECK(made.port == row.port);
            CHECK(made.v6 == row.v6);
        }
    }
}

// --- unit tests: the command line -------------------------------------------

const Option* find_option(const string& name) {
    const auto found = std::find_if(std::begin(kOptions), std::end(kOptions),
                                    [&](const Option& option) { return option.name() == name; });
    return found == std::end(kOptions) ? nullptr : found;
}

/// The value that --print-config would show, after these arguments; "error N" where refused.
string setting(const string& name, const vector<string>& args) {
    vector<const char*> words;
    for (const string& arg : args) { words.push_back(arg.c_str()); }
    Config config;
    if (const Error error = parse_command_line(words, config)) {
        CHECK(!error.text.empty());
        return "error " + to_string(error.code);
    }
    const Option* option = find_option(name);
    return name == "app" ? config.app : option != nullptr ? option->get(config) : "no option";
}

TEST_CASE("every number on the command line has a range") {
    const struct {
        const char* name;
        int64_t low, high;
    } cases[] = {
        {"workers", 1, 1000},
        {"threads", 1, 128},
        {"timeout", 0, 31'536'000},
        {"graceful-timeout", 0, 31'536'000},
        {"header-timeout", 1, 31'536'000},
        {"backlog", 1, 65535},
        {"worker-connections", 1, INT_MAX},
        {"max-requests", 0, INT_MAX},
        {"max-requests-jitter", 0, INT_MAX},
        {"limit-request-line", 0, 1 << 20},
        {"limit-request-fields", 0, 32768},
        {"limit-request-field_size", 0, 1 << 20},
        {"limit-request-body", 0, INT64_MAX},
    };
    const string no_numbers[] = {"", "x", "-", "-x", "1e9", "1.5", "+1", " 1", "1 ", "0x10", "1_0"};
    set<string> covered;
    for (const auto& row : cases) {
        const string name = row.name, option = "--" + name;
        CAPTURE(name);
        covered.insert(name);
        const auto with = [&](const string& value) { return setting(name, {option, value}); };
        const string lowest = name == "limit-request-field_size" ? "8190"  // 0 has a meaning
                              : name == "limit-request-fields"   ? "32768"
                                                                 : to_string(row.low);
        CHECK(with(to_string(row.low)) == lowest);
        CHECK(with(to_string(row.low + 1)) == to_string(row.low + 1));
        CHECK(with(to_string(row.high)) == to_string(row.high));
        CHECK(with(to_string(row.low - 1)) == "error 1");
        CHECK(with("-5") == "error 1");
        if (row.high < INT64_MAX) { CHECK(with(to_string(row.high + 1)) == "error 1"); }
        for (const string& text : no_numbers) {
            CAPTURE(text);
            CHECK(with(text) == "error 2");
        }
    }
    for (const Option& option : kOptions) {  // and the table above leaves none out
        const string usage(option.usage()), name(option.name());
        const string value = usage.substr(std::min(usage.rfind(' '), usage.size() - 1) + 1);
        CAPTURE(usage);
        CHECK((value == "N" || value == "SECONDS" || value == "BYTES") ==
              (covered.count(name) == 1));
    }
}

TEST_CASE("a number of more than 63 bits is out of range, not no number") {
    const string names[] = {"--workers", "--timeout", "--backlog", "--limit-request-body"};
    for (const string& name : names) {
        CAPTURE(name);
        CHECK(setting("", {name, "99999999999999999999"}) == "error 1");
        CHECK(setting("", {name, "-99999999999999999999"}) == "error 1");
    }
}

TEST_CASE("an option takes its value in every usual form") {
    const map<string, string> values = {{"bind", ":81"},
                                        {"workers", "7"},
                                        {"threads", "7"},
                                        {"worker-class", "sync"},
                                        {"timeout", "7"},
                                        {"graceful-timeout", "7"},
                                        {"header-timeout", "7"},
                                        {"backlog", "7"},
                                        {"worker-connections", "7"},
                                        {"limit-request-line", "7"},
                                        {"limit-request-fields", "7"},
                                        {"limit-request-field_size", "7"},
                                        {"limit-request-body", "7"},
                                        {"chdir", "/x"},
                                        {"pythonpath", "/a,/b"},
                                        {"env", "A=b=c"},
                                        {"worker-tmp-dir", "/x"},
                                        {"max-requests", "7"},
                                        {"max-requests-jitter", "7"},
                                        {"forwarded-allow-ips", "*"},
                                        {"proxy-allow-from", "10.0.0.0/8,::1"},
                                        {"name", "x"},
                                        {"reload-extra-file", "/x"},
                                        {"pid", "/x"},
                                        {"user", "x"},
                                        {"group", "x"},
                                        {"umask", "0027"},
                                        {"access-logfile", "-"},
                                        {"access-logformat", "%(s)s"},
                                        {"error-logfile", "/x"},
                                        {"log-level", "debug"},
                                        {"python", "/x"},
                                        {"runner", "cmd -x"}};
    for (const auto& each : values) {
        const string &name = each.first, &value = each.second;
        CAPTURE(name);
        const Option* option = find_option(name);
        REQUIRE(option != nullptr);
        REQUIRE((option->get != nullptr));
        CHECK(setting(name, {"--" + name, value}) == value);
        CHECK(setting(name, {"--" + name + "=" + value}) == value);
        CHECK(setting(name, {"m:a", "--" + name, value}) == value);
        CHECK(setting("app", {"--" + name, value, "m:a"}) == "m:a");
        CHECK(setting(name, {"--" + name}) == "error 2");
        if (option->text[1] != '-') {
            const string letter(option->text, 2);
            CHECK(setting(name, {letter, value}) == value);
            CHECK(setting(name, {letter + value}) == value);
            CHECK(setting(name, {letter + "=" + value}) == value);
            CHECK(setting(name, {letter}) == "error 2");
        }
    }
    for (const Option& option : kOptions) {
        CAPTURE(string(option.text));
        CHECK(*option.help() != '\0');
        CHECK(values.count(string(option.name())) ==
              (option.get != nullptr && option.takes_value() ? 1 : 0));
    }
    CHECK(setting("error-logfile", {"--log-file", "/x"}) == "/x");
    CHECK(setting("workers", {"-w", "2", "-w", "3"}) == "3");  // the last one counts
    CHECK(setting("bind", {"-b", ":1", "--bind=:2", "-b:3"}) == ":1,:2,:3");
    CHECK(setting("env", {"-e", "A=1", "-e", "B="}) == "A=1,B=");
    CHECK(setting("chdir", {"--chdir="}) == "");
    CHECK(std::atoi(setting("workers", {"-w", "auto"}).c_str()) >= 1);
}

TEST_CASE("what stands on the command line wrongly is refused with its exit status") {
    const struct {
        vector<string> args;
        string outcome;
    } cases[] = {
        {{"--nope"}, "error 2"},
        {{"-z"}, "error 2"},
        {{"--nope=1"}, "error 2"},
        {{"--work", "2"}, "error 2"},
        {{"--Workers", "2"}, "error 2"},
        {{"---"}, "error 2"},
        {{"--=2"}, "error 2"},
        {{"--help=1"}, "error 2"},
        {{"a:b", "c:d"}, "error 2"},
        {{"-k", "gevent"}, "error 1"},
        {{"--log-level", "loud"}, "error 1"},
        {{"-e", "A"}, "error 1"},
        {{"-e", "=b"}, "error 1"},
        {{"-w", "0"}, "error 1"},
        {{"-w0"}, "error 1"},
        {{"--backlog", "1e9"}, "error 2"},
        {{"-m", "8"}, "error 1"},
        {{"-m", "1000"}, "error 1"},
        {{"-m", ""}, "error 1"},
        {{"-m", "-1"}, "error 1"},
        {{"-w", "Auto"}, "error 2"},
        {{}, "app_example:app"},
        {{"m"}, "m"},
        {{"--", "-m:a"}, "-m:a"},
        {{"-w", "3", "--", "m:a"}, "m:a"},
        {{"--", "m:a", "-w"}, "error 2"},
    };
    for (const auto& row : cases) {
        string line;
        for (const string& arg : row.args) { line += arg + " "; }
        CAPTURE(line);
        CHECK(setting("app", row.args) == row.outcome);
    }
}

TEST_CASE("switches are off until they are given") {
    Config config;
    CHECK(!parse_command_line({"a:b"}, config));
    CHECK_FALSE((config.check_config || config.print_config || config.version || config.help));
    CHECK(!parse_command_line({"--check-config", "--print-config", "-v", "-h"}, config));
    CHECK((config.check_config && config.print_config && config.version && config.help));
}

TEST_CASE("the defaults are gunicorn's, and PORT names the port to listen on") {
    const SetEnv no_port("PORT", nullptr);
    CHECK(setting("bind", {}) == "127.0.0.1:8000");
    CHECK(setting("workers", {}) == "2");
    CHECK(setting("timeout", {}) == "30");
    CHECK(setting("graceful-timeout", {}) == "30");
    CHECK(setting("header-timeout", {}) == "10");
    CHECK(setting("backlog", {}) == "2048");
    CHECK(setting("worker-connections", {}) == "1000");
    CHECK(setting("limit-request-line", {}) == "4094");
    CHECK(setting("limit-request-fields", {}) == "100");
    CHECK(setting("limit-request-field_size", {}) == "8190");
    CHECK(setting("limit-request-body", {}) == "1073741824");
    CHECK(setting("access-logfile", {}) == "");
    CHECK(setting("log-level", {}) == "info");
    const SetEnv port("PORT", "5000");
    CHECK(setting("bind", {}) == "0.0.0.0:5000");
    CHECK(setting("bind", {"-b", ":1"}) == ":1");
    const SetEnv empty("PORT", "");
    CHECK(setting("bind", {}) == "127.0.0.1:8000");
}

// --- unit tests: responses --------------------------------------------------

TEST_CASE("the head of an application's response is checked") {
    const struct {
        string title;
        string head;  // after "Status: "
        bool good;
        int64_t length = -1;
    } cases[] = {
        {"a status alone", "200 OK\n", true},
        {"a reason of words", "404 Not Found at All\n", true},
        {"a reason above ASCII", "200 \xe9t\xe9\n", true},
        {"fields", "200 OK\nA: b\nC: d\n", true},
        {"an empty value", "200 OK\nA: \n", true},
        {"a value above ASCII", "200 OK\nA: \xff\n", true},
        {"a Content-Length", "200 OK\nContent-Length: 12\n", true, 12},
        {"a Content-Length of 0", "200 OK\ncontent-length: 0\n", true, 0},
        {"no reason", "200\n", false},
        {"no blank", "200OK\n", false},
        {"no digits", "OK\n", false},
        {"letters for digits", "abc OK\n", false},
        {"two digits", "20 OK\n", false},
        {"four digits", "2000 OK\n", false},
        {"an interim status", "100 Continue\n", false},
        {"a negative status", "-20 OK\n", false},
        {"a status with a sign", "+20 OK\n", false},
        {"an empty status", "\n", false},
        {"a control character in the reason", "200 O\x01K\n", false},
        {"CR in the reason", "200 OK\rA: b\n", false},
        {"NUL in the reason", "200 O\0K\n"s, false},
        {"ESC in the reason", "200 \x1b[0m\n", false},
        {"a name with a blank", "200 OK\nA B: c\n", false},
        {"a blank before the colon", "200 OK\nA : c\n", false},
        {"an empty name", "200 OK\n: c\n", false},
        {"a name above ASCII", "200 OK\n\xe9: c\n", false},
        {"no colon", "200 OK\nA\n", false},
        {"CR in a value", "200 OK\nA: b\rc\n", false},
        {"NUL in a value", "200 OK\nA: \0\n"s, false},
        {"DEL in a value", "200 OK\nA: \x7f\n", false},
        {"obs-fold", "200 OK\nA: b\n c\n", false},
        {"two Content-Lengths", "200 OK\nContent-Length: 1\ncontent-length: 1\n", false},
        {"a Content-Length with a sign", "200 OK\nContent-Length: +1\n", false},
        {"a negative Content-Length", "200 OK\nContent-Length: -1\n", false},
        {"a Content-Length that is no number", "200 OK\nContent-Length: x\n", false},
        {"an empty Content-Length", "200 OK\nContent-Length:\n", false},
        {"a Content-Length list", "200 OK\nContent-Length: 1, 1\n", false},
        {"a huge Content-Length", "200 OK\nContent-Length: 9223372036854775808\n", false},
    };
    for (const auto& row : cases) {
        CAPTURE(row.title);
        const Exact block("Status: " + row.head);
        seed(1, "Status: " + row.head);
        Response response;
        const Error error = parse_response(block.view(), response);
        CHECK(!error == row.good);
        if (!row.good || error) {
            CHECK(error.code == 500);
            for (const char c : error.text) { CHECK((c >= 0x20 && c != 0x7f)); }  // fit for a log
            continue;
        }
        CHECK(response.status == std::atoi(row.head.c_str()));
        CHECK(response.length == row.length);
        const Reply reply(final_head(response, 1, false));
        CHECK(reply.status == response.status);
        string_view lines = row.head;
        CHECK(contains(reply.head, "HTTP/1.1 " + string(cut(lines, '\n')) + "\r\n"));
        while (!lines.empty()) { CHECK(contains(reply.head, string(cut(lines, '\n')) + "\r\n")); }
    }
    Response response;
    CHECK(parse_response("Content-Type: a/b\nStatus: 200 OK\n", response).code == 500);
    CHECK(parse_response("", response).code == 500);
}

TEST_CASE("hop-by-hop fields of the application are dropped, and named for the log") {
    const string names[] = {"Connection", "Keep-Alive", "Proxy-Authenticate",
                            "upgrade",    "TE",         "Proxy-Authorization",
                            "Trailers",   "Trailer",    "Transfer-Encoding"};
    for (const string& name : names) {
        CAPTURE(name);
        Response response;
        CHECK(!parse_response("Status: 200 OK\nA: b\n" + name + ": secret\nC: d\n", response));
        const Reply reply(final_head(response, 1, false));
        CHECK_FALSE(contains(reply.head, "secret"));
        CHECK(reply.fields.at("a") == "b");
        CHECK(reply.fields.at("c") == "d");
        CHECK(contains(response.dropped, name));
    }
    Response response;
    CHECK(!parse_response("Status: 200 OK\nConnections: x\nTe-X: y\n", response));
    CHECK(response.dropped.empty());
}

TEST_CASE("the final head has one Date, one Server, and Connection: close") {
    const struct {
        string title;
        string head;
        int minor;
        bool chunked;
        map<string, string> fields;  // that must be there; an empty value: not be there
    } cases[] = {
        {"the server's own",
         "Status: 200 OK\n",
         1,
         false,
         {{"connection", "close"}, {"transfer-encoding", ""}, {"content-length", ""}}},
        {"chunked", "Status: 200 OK\n", 1, true, {{"transfer-encoding", "chunked"}}},
        {"for HTTP/1.0", "Status: 200 OK\n", 0, false, {{"connection", "close"}}},
        {"the application's Date wins",
         "Status: 200 OK\ndate: today\n",
         1,
         false,
         {{"date", "today"}}},
        {"the application's Server wins",
         "Status: 200 OK\nSERVER: mine\n",
         1,
         false,
         {{"server", "mine"}}},
        {"its Connection does not",
         "Status: 200 OK\nConnection: keep-alive\n",
         1,
         false,
         {{"connection", "close"}}},
        {"its Transfer-Encoding does not",
         "Status: 200 OK\nTransfer-Encoding: gzip\n",
         1,
         true,
         {{"transfer-encoding", "chunked"}}},
        {"a Content-Length is kept",
         "Status: 200 OK\nContent-Length: 5\n",
         1,
         false,
         {{"content-length", "5"}}},
        {"204 has no Content-Length",
         "Status: 204 No Content\nContent-Length: 0\n",
         1,
         false,
         {{"content-length", ""}}},
        {"304 may have one",
         "Status: 304 Not Modified\nContent-Length: 5\n",
         1,
         false,
         {{"content-length", "5"}}},
    };
    for (const auto& row : cases) {
        CAPTURE(row.title);
        Response response;
        CHECK(!parse_response(row.head, response));
        const string text = final_head(response, row.minor, row.chunked);
        const Reply reply(text);
        CHECK(reply.version == (row.minor > 0 ? "HTTP/1.1" : "HTTP/1.0"));
        CHECK(text.size() == text.find("\r\n\r\n") + 4);
        CHECK(count(text, "\n") == count(text, "\r\n"));
        CHECK(count(text, "\r\n") == reply.fields.size() + 2);  // none stands twice
        for (const char* name : {"date", "server", "connection"}) {
            CHECK(reply.fields.count(name) == 1);
        }
        for (const auto& each : row.fields) {
            const string &name = each.first, &value = each.second;
            CAPTURE(name);
            CHECK(reply.fields.count(name) == (value.empty() ? 0 : 1));
            if (!value.empty() && reply.fields.count(name) == 1) {
                CHECK(reply.fields.at(name) == value);
            }
        }
    }
}

TEST_CASE("Date is the present time in the fixed form of RFC 9110") {
    Response response;
    CHECK(!parse_response("Status: 200 OK\n", response));
    const string date = Reply(final_head(response, 1, false)).fields["date"];
    struct tm parts = {};
    const char* end = ::strptime(date.c_str(), "%a, %d %b %Y %H:%M:%S GMT", &parts);
    REQUIRE(end != nullptr);
    CHECK(*end == '\0');
    CHECK(date.size() == 29);
    CHECK_FALSE(contains(date, "  "));
    CHECK(std::abs(::timegm(&parts) - std::time(nullptr)) <= 2);
}

TEST_CASE("the server's own answers are complete, and name their status") {
    set<string> reasons;
    const int statuses[] = {400, 408, 413, 414, 417, 431, 500, 501, 502, 503, 504, 505};
    for (const int status : statuses) {
        CAPTURE(status);
        string body;
        const Response response = error_response(status, body);
        CHECK(response.status == status);
        const Reply reply(final_head(response, 1, false) + body);
        REQUIRE(reply.status == status);
        CHECK(reply.whole);
        CHECK(reply.fields.count("content-length") == 1);
        CHECK(contains(reply.fields.at("content-type"), "text/"));
        CHECK(reply.fields.count("retry-after") == (status == 503 ? 1 : 0));
        CHECK(contains(body, to_string(status)));
        string_view line = reply.head;
        line.remove_prefix(13);
        reasons.insert(string(cut(line, '\r')));
    }
    CHECK(reasons.size() == std::size(statuses));
    CHECK(reasons.count("") == 0);
}

TEST_CASE("frames of a runner are read whole or byte by byte") {
    // <end>, <failed>, <bad>: events; all else: the payloads.
    const struct {
        string title;
        string bytes, events;
    } cases[] = {
        {"nothing", "", ""},
        {"ready", "0:,", "<end>"},
        {"one frame and the end", "5:hello,0:,", "hello<end>"},
        {"frames", "2:he,3:llo,0:,", "hello<end>"},
        {"two responses", "1:a,0:,1:b,0:,", "a<end>b<end>"},
        {"a failure", "0:!", "<failed>"},
        {"a response, and the end", "1:a,0:;0:,", "a<whole><end>"},
        {"a mark after a payload", "1:a;", "a<bad>"},
        {"a failure midway, and another response", "1:a,0:!1:b,0:,", "a<failed>b<end>"},
        {"a payload that looks like frames", "6:0:,0:!,0:,", "0:,0:!<end>"},
        {"any bytes in a payload", "4:\0\n\xff,,0:,"s, "\0\n\xff,<end>"s},
        {"two digits", "11:hello world,", "hello world"},
        {"zeros before the size", "005:hello,00:,", "hello<end>"},
        {"half a frame", "5:hel", "hel"},
        {"half a size", "12", ""},
        {"12 digits", "000000000001:a,0:,", "a<end>"},
        {"13 digits", "0000000000001:a,0:,", "<bad>"},
        {"no size", ":a,", "<bad>"},
        {"no digits", "x:a,", "<bad>"},
        {"a sign", "-1:a,", "<bad>"},
        {"a blank", " 1:a,", "<bad>"},
        {"a blank after the size", "1 :a,", "<bad>"},
        {"a comma for the colon", "1,a,", "<bad>"},
        {"no comma", "1:ab", "a<bad>"},
        {"a failure mark after a payload", "1:a!", "a<bad>"},
        {"neither end nor failure", "0:x", "<bad>"},
        {"plain text", "Traceback", "<bad>"},
        {"text after a response", "0:,\n", "<end><bad>"},
    };
    using Event = NetstringReader::Event;
    for (const auto& row : cases) {
        CAPTURE(row.title);
        seed(2, row.bytes);
        for (const size_t step : {std::max<size_t>(row.bytes.size(), 1), size_t{1}, size_t{3}}) {
            CAPTURE(step);
            NetstringReader reader;
            string events;
            bool bad = false;
            for (size_t at = 0; at < row.bytes.size() && !bad; at += step) {
                const Exact block(string_view(row.bytes).substr(at, step));
                string_view in = block.view(), piece;
                Event event = Event::Piece;
                while (event != Event::NeedMore && !bad) {
                    event = reader.next(in, piece);
                    bad = event == Event::Bad;
                    if (event == Event::Piece) { events += piece; }
                    events += event == Event::End      ? "<end>"
                              : event == Event::Failed ? "<failed>"
                              : event == Event::Whole  ? "<whole>"
                              : bad                    ? "<bad>"
                                                       : "";
                }
                CHECK((bad || in.empty()));
            }
            CHECK(events == row.events);
        }
    }
}

// --- unit tests: logs -------------------------------------------------------

TEST_CASE("escape makes every byte of a client harmless in a log") {
    for (int byte = 0; byte < 256; ++byte) {
        const char c = static_cast<char>(byte);
        CAPTURE(byte);
        const string out = escape(Exact(string(1, c)).view());
        if (c == '"' || c == '\\') {
            CHECK(out == "\\"s + c);
        } else if (byte >= 0x20 && byte < 0x7f) {
            CHECK(out == string(1, c));
        } else {
            char expected[8];
            std::snprintf(expected, sizeof expected, "\\x%02x", static_cast<unsigned>(byte));
            CHECK(out == expected);
        }
    }
    CHECK(escape("") == "");
    CHECK(escape(string(9000, 'x')) == string(8192, 'x'));  // one value is no whole log
    CHECK(escape("a\x1b[31m\"b\"\r\n") == "a\\x1b[31m\\\"b\\\"\\x0d\\x0a");
}

TEST_CASE("lookup finds a name, never a value, in an environ block") {
    const string block = "A\0v\0v\0B\0EMPTY\0\0PATH\0/x\0"s;
    const Exact exact(block);
    CHECK(lookup(exact.view(), "A") == "v");
    CHECK(lookup(exact.view(), "a") == "v");
    CHECK(lookup(exact.view(), "v") == "B");
    CHECK(lookup(exact.view(), "EMPTY") == "");
    CHECK(lookup(exact.view(), "PATH") == "/x");
    CHECK(lookup(exact.view(), "B") == "");
    CHECK(lookup(exact.view(), "PAT") == "");
    CHECK(lookup(exact.view(), "/x") == "");
    CHECK(lookup("", "A") == "");
}

TEST_CASE("head_field finds a field by its name in any case") {
    const Exact head("HTTP/1.1 200 OK\r\nA:  b \r\nLong-Name: c: d\r\nEmpty:\r\nLast: x\r\n\r\n");
    CHECK(head_field(head.view(), "a") == "b");
    CHECK(head_field(head.view(), "LONG-NAME") == "c: d");
    CHECK(head_field(head.view(), "Empty") == "");
    CHECK(head_field(head.view(), "last") == "x");
    CHECK(head_field(head.view(), "long") == "");
    CHECK(head_field(head.view(), "c") == "");
    CHECK(head_field("", "a") == "");
}

TEST_CASE("basic_user reads the user of a Basic authorization") {
    const struct {
        string credentials, user;
    } cases[] = {
        {"Basic dXNlcjpwYXNz", "user"},  // user:pass
        {"basic dXNlcjpwYXNz", "user"},
        {"BASIC   dXNlcjpwYXNz  ", "user"},
        {"Basic dTo=", "u"},                 // u:
        {"Basic dTo", "u"},                  // without its padding
        {"Basic dXNlcjpwYTpzcw==", "user"},  // user:pa:ss
        {"Basic OnB3", ""},                  // :pw
        {"Basic dXNlcg==", ""},              // no colon
        {"Basic YQoiYjpj", "a\n\"b"},        // the log escapes it
        {"Basic w6k6eA==", "\xc3\xa9"},
        {"Basic", ""},
        {"Basic ", ""},
        {"Basic !!!!", ""},
        {"Bearer dXNlcjpwYXNz", ""},
        {"Basicx dXNlcjpwYXNz", ""},
        {"", ""},
    };
    for (const auto& row : cases) {
        CAPTURE(row.credentials);
        CHECK(basic_user(Exact(row.credentials).view()) == row.user);
    }
}

TEST_CASE("every atom of the access log has its value, or a dash") {
    const string env =
        "REQUEST_METHOD\0PUT\0PATH_INFO\0/a b\0QUERY_STRING\0q=1\0SERVER_PROTOCOL\0HTTP/1.1\0"
        "REMOTE_ADDR\0"
        "10.0.0.9\0HTTP_REFERER\0http://r/\0HTTP_USER_AGENT\0curl\0"
        "HTTP_AUTHORIZATION\0Basic dXNlcjpwYXNz\0HTTP_X_FORWARDED_FOR\0"
        "1.2.3.4\0"
        "CONTENT_TYPE\0a/b\0"s;
    const string head = "HTTP/1.1 201 Created\r\nContent-Type: c/d\r\nX-Id: 7\r\n\r\n";
    Access full, none;
    full.env = env;
    full.head = head;
    full.line = "PUT /a%20b?q=1 HTTP/1.1";
    full.peer = "10.0.0.9";
    full.status = 201;
    full.body_bytes = 1234;
    full.took = std::chrono::microseconds(2'003'004);
    none.status = 400;
    const string pid = "<" + to_string(::getpid()) + ">";
    const struct {
        string atom, value, without;  // without: for a request of which nothing is known
    } cases[] = {
        {"%(h)s", "10.0.0.9", ""},
        {"%(l)s", "-", "-"},
        {"%(u)s", "user", "-"},
        {"%(r)s", "PUT /a%20b?q=1 HTTP/1.1", "-"},
        {"%(m)s", "PUT", "-"},
        {"%(U)s", "/a b", "-"},
        {"%(q)s", "q=1", ""},
        {"%(H)s", "HTTP/1.1", "-"},
        {"%(s)s", "201", "400"},
        {"%(B)s", "1234", "0"},
        {"%(b)s", "1234", "-"},
        {"%(f)s", "http://r/", "-"},
        {"%(a)s", "curl", "-"},
        {"%(T)s", "2", "0"},
        {"%(M)s", "2003", "0"},
        {"%(D)s", "2003004", "0"},
        {"%(L)s", "2.003004", "0.000000"},
        {"%(p)s", pid, pid},
        {"%({X-Forwarded-For}i)s", "1.2.3.4", "-"},
        {"%({x-forwarded-for}i)s", "1.2.3.4", "-"},
        {"%({Content-Type}i)s", "a/b", "-"},
        {"%({missing}i)s", "-", "-"},
        {"%({content-type}o)s", "c/d", "-"},
        {"%({X-Id}o)s", "7", "-"},
        {"%({missing}o)s", "-", "-"},
        {"%({REQUEST_METHOD}e)s", "PUT", "-"},
        {"%({MISSING}e)s", "-", "-"},
        {"%({request_method}e)s", "PUT", "-"},
        {"%(s)d", "201", "400"},
        {"%(s)x", "%(s)x", "%(s)x"},
        {"%(x) and %(s)s", "%(x) and 201", "%(x) and 400"},
        {"100%%(s)s%", "100%(s)s%", "100%(s)s%"},
        {"%(z)s", "-", "-"},
        {"%()s", "-", "-"},
        {"%({}i)s", "-", "-"},
        {"plain text", "plain text", "plain text"},
        {"%(h", "%(h", "%(h"},
        {"a\"%(s)s\"%(s)s", "a\"201\"201", "a\"400\"400"},
        {"", "", ""},
    };
    for (const auto& row : cases) {
        CAPTURE(row.atom);
        seed(3, row.atom);
        const Exact format(row.atom);
        CHECK(access_line(format.view(), full) == row.value + "\n");
        CHECK(access_line(format.view(), none) == row.without + "\n");
    }
    const auto now = [] {
        char text[64];
        const time_t seconds_now = std::time(nullptr);
        struct tm parts = {};
        ::localtime_r(&seconds_now, &parts);
        return string(text, std::strftime(text, sizeof text, "[%d/%b/%Y:%H:%M:%S %z]\n", &parts));
    };
    const string before = now(), line = access_line("%(t)s", full), after = now();
    CHECK((line == before || line == after));
    CHECK(access_line(Config{}.access_log_format, full) ==
          "10.0.0.9 - user " + access_line("%(t)s", full).substr(0, before.size() - 1) +
              " \"PUT /a%20b?q=1 HTTP/1.1\" 201 1234 \"http://r/\" \"curl\"\n");
}

TEST_CASE("a pid file names a process by a number that one can have, on a line of its own") {
    const TempDir dir;
    const struct {
        string text;
        pid_t pid;
    } rows[] = {{"12\n", 12}, {"12", 12},          {"12\nx", 12},       {"", 0},
                {"\n", 0},    {"x\n", 0},          {"4294967297\n", 0}, {"12 \n", 0},
                {"-1\n", 0},  {string(40, '1'), 0}};
    for (const auto& row : rows) {
        CAPTURE(row.text);
        write_file(dir.path + "/pid", row.text);
        CHECK(read_pidfile(dir.path + "/pid") == row.pid);
    }
    CHECK(read_pidfile(dir.path + "/none") == 0);
}

TEST_CASE("an address that IPv6 only wraps is shown as what it is") {
    const auto shown = [](int family, const char* text) {
        sockaddr_storage address{};
        auto& v4 = reinterpret_cast<sockaddr_in&>(address);
        auto& v6 = reinterpret_cast<sockaddr_in6&>(address);
        address.ss_family = static_cast<sa_family_t>(family);
        (family == AF_INET ? v4.sin_port : v6.sin6_port) = htons(80);
        void* number = family == AF_INET ? static_cast<void*>(&v4.sin_addr) : &v6.sin6_addr;
        REQUIRE(::inet_pton(family, text, number) == 1);
        string host, port;
        address_text(address, host, port);
        return host + " " + port;
    };
    CHECK(shown(AF_INET, "10.0.0.9") == "10.0.0.9 80");
    CHECK(shown(AF_INET6, "::ffff:10.0.0.9") == "10.0.0.9 80");
    CHECK(shown(AF_INET6, "fe80::1") == "fe80::1 80");
    CHECK(shown(AF_INET6, "::10.0.0.9") == "::10.0.0.9 80");
    for (const string host : {"127.0.0.1", "0.0.0.0"}) {  // an IPv6 socket of systemd's, say
        CAPTURE(host);
        Fd fd(::socket(AF_INET6, SOCK_STREAM, 0));
        sockaddr_in6 address{};
        address.sin6_family = AF_INET6;
        REQUIRE(::inet_pton(AF_INET6, ("::ffff:" + host).c_str(), &address.sin6_addr) == 1);
        const int off = 0;
        ::setsockopt(fd.get(), IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
        if (::bind(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof address) < 0) {
            MESSAGE("not run: there is no IPv6");
            return;
        }
        REQUIRE(::listen(fd.get(), 1) == 0);
        Listener made;
        CHECK_FALSE(describe(std::move(fd), made));
        CHECK(made.text == "http://" + host + ":" + made.port);
        CHECK(made.wildcard == (host == "0.0.0.0"));
    }
}

TEST_CASE("nothing that a client sent can break a line of the access log") {
    const string evil = "\x1b[2J\"\\\n\r\t\x7f\x01";
    const string escaped = "\\x1b[2J\\\"\\\\\\x0a\\x0d\\x09\\x7f\\x01";
    string block;
    for (const char* name : {"REQUEST_METHOD", "PATH_INFO", "QUERY_STRING", "SERVER_PROTOCOL",
                             "HTTP_REFERER", "HTTP_USER_AGENT", "HTTP_X"}) {
        ((((block += name) += '\0') += evil) += '\0');
    }
    block += "HTTP_AUTHORIZATION\0Basic GwoiOng=\0"s;  // ESC LF " :x
    Access access;
    access.env = block;
    access.head = "HTTP/1.1 200 OK\r\nX: a\"b\\c\x1b\r\n\r\n";
    access.line = evil;
    access.peer = evil;
    const string atoms[] = {"%(h)s", "%(r)s", "%(m)s", "%(U)s",    "%(q)s",
                            "%(H)s", "%(f)s", "%(a)s", "%({x}i)s", "%({PATH_INFO}e)s"};
    for (const string& atom : atoms) {
        CAPTURE(atom);
        CHECK(access_line(atom, access) == escaped + "\n");
    }
    CHECK(access_line("%(u)s", access) == "\\x1b\\x0a\\\"\n");
    CHECK(access_line("%({x}o)s", access) == "a\\\"b\\\\c\\x1b\n");
}

// --- unit tests: processes, files, descriptors ------------------------------

bool is_open(int fd) { return ::fcntl(fd, F_GETFD) >= 0; }

TEST_CASE("an Fd closes its descriptor once, and only the one that it owns") {
    const int a = ::open("/dev/null", O_RDONLY | O_CLOEXEC);
    const int b = ::open("/dev/null", O_RDONLY | O_CLOEXEC);
    REQUIRE(is_open(a));
    REQUIRE(is_open(b));
    {
        Fd empty;
        CHECK_FALSE(static_cast<bool>(empty));
        CHECK(empty.get() == -1);
        Fd first(a);
        CHECK(first.get() == a);
        Fd second(std::move(first));
        CHECK(first.get() == -1);
        CHECK(second.get() == a);
        Fd& alias = second;
        second = std::move(alias);
        CHECK(second.get() == a);
        CHECK(is_open(a));
        Fd third(b);
        third = std::move(second);  // closes what it had
        CHECK_FALSE(is_open(b));
        CHECK(is_open(a));
        CHECK(third.get() == a);
        const int released = third.release();
        CHECK(released == a);
        CHECK_FALSE(static_cast<bool>(third));
        third.reset(a);
        CHECK(is_open(a));
    }
    CHECK_FALSE(is_open(a));
    Fd zero(::open("/dev/null", O_RDONLY | O_CLOEXEC));
    const int number = zero.get();
    zero.reset();
    CHECK_FALSE(is_open(number));
    CHECK_FALSE(static_cast<bool>(zero));
    static_assert(!std::is_copy_constructible_v<Fd> && !std::is_copy_assignable_v<Fd>);
}

/// Takes everything out of a spool, in pieces of odd sizes.
string drain(Spool& spool) {
    string all;
    for (size_t take = 1;; take = take % 9973 * 3 + 1) {
        const string_view front = spool.front();
        if (front.empty()) { return all; }
        const string_view piece = front.substr(0, take);
        all += piece;
        spool.pop(piece.size());
    }
}

string pattern(size_t size) {
    string text(size, '\0');
    Random random;
    for (char& c : text) { c = static_cast<char>(random.below(256)); }
    return text;
}

TEST_CASE("a spool keeps up to its limit in memory, more goes to a file, in order") {
    Spool spool;
    CHECK(spool.size() == 0);
    CHECK(spool.front().empty());
    spool.append("", 10);
    CHECK(spool.size() == 0);
    spool.append("hello", 10);
    spool.append("world", 10);
    CHECK(spool.memory() == 10);  // as much as the limit allows
    CHECK(spool.newest() == "helloworld");
    CHECK(spool.stored() == 0);
    CHECK_FALSE(static_cast<bool>(spool.file()));
    spool.append("!", 10);
    CHECK(spool.memory() == 0);
    CHECK(spool.stored() == 11);
    CHECK(static_cast<bool>(spool.file()));
    CHECK_FALSE(spool.full());
    CHECK_FALSE(spool.failed());
    struct stat info = {};
    CHECK(::fstat(spool.file().get(), &info) == 0);
    CHECK(info.st_nlink == 0);
    CHECK((::fcntl(spool.file().get(), F_GETFD) & FD_CLOEXEC) != 0);
    spool.append(" and more", 1000);
    CHECK(spool.memory() == 9);
    CHECK(spool.size() == 20);
    spool.prepend("first ");
    CHECK(drain(spool) == "first helloworld! and more");
    CHECK(spool.size() == 0);
    spool.append("again", 10);
    CHECK(spool.memory() == 5);
    CHECK(drain(spool) == "again");
    spool.append("limit 0: straight to the file", 0);
    CHECK(spool.memory() == 0);
    CHECK(drain(spool) == "limit 0: straight to the file");
}

TEST_CASE("a spool gives back what was put in, whatever the sizes and the order") {
    const string source = pattern(200000);
    Random random;
    Spool spool;
    string expected;
    size_t taken = 0;
    bool same = true, sizes = true;
    for (int round = 0; round < 800; ++round) {
        if (random.below(2) != 0) {
            const string data = source.substr(random.below(100000), random.below(30000));
            spool.append(data, random.below(4) * 20000);
            expected += data;
        }
        for (size_t pops = random.below(4); pops-- > 0;) {
            const string_view piece = spool.front().substr(0, random.below(20000));
            same = same && piece == string_view(expected).substr(taken, piece.size());
            spool.pop(piece.size());
            taken += piece.size();
        }
        sizes = sizes && spool.size() == static_cast<int64_t>(expected.size() - taken);
    }
    CHECK(same);
    CHECK(sizes);
    CHECK(taken > 1000000);
    CHECK(drain(spool) == expected.substr(taken));
    CHECK_FALSE(spool.failed());
}

TEST_CASE("a spool that cannot make its file keeps all bytes, and says so") {
    const TempDir dir;
    const SetEnv missing("TMPDIR", (dir.path + "/missing").c_str());
    Spool spool;
    spool.append("0123456789", 10);
    CHECK_FALSE(spool.failed());
    CHECK_FALSE(spool.full());
    spool.append("abc", 10);
    CHECK(spool.failed());
    CHECK(spool.full());
    spool.append("def", 1000);
    const SetEnv back("TMPDIR", dir.path.c_str());
    spool.append("ghi", 10);  // there is room for a file again, and all of it goes there
    CHECK_FALSE(spool.failed());
    CHECK(spool.stored() == 19);
    CHECK(spool.size() == 19);
    CHECK(drain(spool) == "0123456789abcdefghi");
    CHECK(spool.size() == 0);
}

TEST_CASE("a spool whose disk fills up midway loses nothing and doubles nothing") {
    struct rlimit before = {}, small = {};
    ::getrlimit(RLIMIT_FSIZE, &before);
    small = before;
    small.rlim_cur = 100000;
    const auto handler = ::signal(SIGXFSZ, SIG_IGN);
    ::setrlimit(RLIMIT_FSIZE, &small);
    const string data = pattern(240000);
    Spool spool;
    for (size_t at = 0; at < data.size(); at += 60000) {
        spool.append(string_view(data).substr(at, 60000), 60000);
    }
    ::setrlimit(RLIMIT_FSIZE, &before);
    ::signal(SIGXFSZ, handler);
    CHECK(spool.failed());
    CHECK(spool.full());
    CHECK(spool.size() == static_cast<int64_t>(data.size()));
    CHECK(spool.stored() == 0);
    CHECK((drain(spool) == data));
    CHECK_FALSE(spool.failed());
    spool.append(data, 0);  // the disk has room again
    CHECK(spool.stored() == static_cast<int64_t>(data.size()));
    CHECK((drain(spool) == data));
}

TEST_CASE("a spool with a gibibyte in its file is full, until it is empty") {
    Spool spool;
    Fd file;
    REQUIRE(!make_temp_file(temp_dir(), file));
    REQUIRE(::ftruncate(file.get(), (int64_t{1} << 30) - 1) == 0);
    spool.adopt_file(std::move(file), (int64_t{1} << 30) - 1);
    CHECK_FALSE(spool.full());
    spool.append("x", 0);
    CHECK(spool.full());
    CHECK_FALSE(spool.failed());
    while (spool.size() > 0) { spool.pop(spool.front().size()); }
    CHECK_FALSE(spool.full());  // though nobody has asked for more yet
}

TEST_CASE("a spool takes over the file of another, before its own memory") {
    Spool from, to;
    from.append("file ", 2);
    from.append("memory", 10);
    to.adopt_file(Fd(::fcntl(from.file().get(), F_DUPFD_CLOEXEC, 3)), from.stored());
    to.append(from.newest(), 10);
    CHECK(to.size() == 11);
    CHECK(drain(to) == "file memory");
}

TEST_CASE("a spool that is never quite empty does not grow") {
    const auto resident = [] {  // bytes of this process in memory
        const string text = read_file("/proc/self/statm");
        return std::atol(text.c_str() + text.find(' ')) * ::sysconf(_SC_PAGESIZE);
    };
    const string piece(kPiece, 'x');
    Spool spool;
    spool.append("behind", size_t{1} << 20);
    const long before = resident();
    for (int i = 0; i < 3000; ++i) {  // 188 MiB go through
        spool.append(piece, size_t{1} << 20);
        for (size_t left = piece.size(); left > 0;) {
            const size_t n = std::min(left, spool.front().size());
            spool.pop(n);
            left -= n;
        }
    }
    CHECK(spool.size() == 6);
    CHECK(resident() - before < (64L << 20));
}

/// A queue as the workers have it.
Pair datagram_pair() {
    int fds[2];
    REQUIRE(::socketpair(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0, fds) == 0);
    return {Fd(fds[0]), Fd(fds[1])};
}

bool send_to(const Pair& queue, string data, int first, int second) {
    int fds[] = {first, second};
    return exchange_message(queue.first, true, data.data(), data.size(), fds) >= 0;
}

TEST_CASE("a message of the ready queue brings its bytes and its descriptors") {
    const Pair queue = datagram_pair();
    vector<char> buffer(kMaxMessage);
    int fds[2] = {-1, -1};
    CHECK(exchange_message(queue.second, false, buffer.data(), buffer.size(), fds) < 0);
    CHECK(would_block());  // it does not wait
    Pair pipes[2];
    for (Pair& each : pipes) { REQUIRE(!make_pipe(each)); }
    const string data = "a\0b"s + string(50000, 'x');
    REQUIRE(send_to(queue, data, pipes[0].second.get(), pipes[1].second.get()));
    for (Pair& each : pipes) { each.second.reset(); }  // the message alone holds them now
    const ssize_t size = exchange_message(queue.second, false, buffer.data(), buffer.size(), fds);
    REQUIRE(size == static_cast<ssize_t>(data.size()));
    CHECK((string_view(buffer.data(), data.size()) == data));
    for (size_t i = 0; i < 2; ++i) {  // in the order in which they were sent
        Fd fd(fds[i]);
        const string text = "to " + to_string(i);
        CHECK(::write(fd.get(), text.data(), text.size()) > 0);
        fd.reset();
        char back[16];
        CHECK(::read(pipes[i].first.get(), back, sizeof back) == static_cast<ssize_t>(text.size()));
        CHECK(back[3] == static_cast<char>('0' + i));
        CHECK(::read(pipes[i].first.get(), back, sizeof back) == 0);  // no other writer
    }
}

TEST_CASE("the ready queue keeps the order, refuses when it is full, and takes more later") {
    const Pair queue = datagram_pair();
    const Fd null(::open("/dev/null", O_RDONLY | O_CLOEXEC));
    const int number = null.get();
    int sent = 0;
    while (sent < 100000 && send_to(queue, to_string(sent), number, number)) { ++sent; }
    CHECK(sent > 5);
    CHECK(sent < 100000);
    char buffer[100];
    const auto receive = [&] {
        int fds[2] = {-1, -1};
        const ssize_t n = exchange_message(queue.second, false, buffer, sizeof buffer, fds);
        for (const int fd : fds) { CHECK((Fd(fd) ? n >= 0 : n < 0)); }
        return string(buffer, static_cast<size_t>(std::max<ssize_t>(n, 0)));
    };
    for (int i = 0; i < sent; ++i) { REQUIRE(receive() == to_string(i)); }
    CHECK(receive() == "");
    CHECK(send_to(queue, "more", number, number));
    CHECK(receive() == "more");
}

TEST_CASE("a message too large for the queue is refused, not cut") {
    const Pair queue = datagram_pair();
    const Fd null(::open("/dev/null", O_RDONLY | O_CLOEXEC));
    CHECK_FALSE(send_to(queue, string(8 << 20, 'x'), null.get(), null.get()));
    CHECK(errno == EMSGSIZE);
    char byte;
    CHECK(::recv(queue.second.get(), &byte, 1, MSG_DONTWAIT) < 0);
}

TEST_CASE("exit_text names the exit status or the signal") {
    const auto status_of = [](const std::function<void()>& end) {
        const pid_t pid = ::fork();
        if (pid == 0) {
            end();
            ::_exit(99);
        }
        int status = 0;
        REQUIRE(::waitpid(pid, &status, 0) == pid);
        return status;
    };
    const string exited = exit_text(status_of([] { ::_exit(43); }));
    CHECK(contains(exited, "43"));
    CHECK_FALSE(contains(exited, "signal"));
    const string killed = exit_text(status_of([] { ::raise(SIGKILL); }));
    CHECK(contains(killed, "9"));
    CHECK(contains(killed, ::strsignal(SIGKILL)));
}

/// Runs a Python program; its output and errors, and "exit N" behind them where it failed.
string python(const string& source, const string& argument = "") {
    const TempDir dir;
    write_file(dir.path + "/program.py", source);
    const string command =
        "cd " + dir.path + " && /usr/bin/python3 -W error program.py " + argument + " >output 2>&1";
    const int status = std::system(command.c_str());
    return read_file(dir.path + "/output") + (status == 0 ? "" : "exit " + to_string(status));
}

TEST_CASE("the runner is Python 3.7, and at most 250 lines of it") {
    const string runner = kRunner;
    CHECK(count(runner, "\n") <= 250);
    CHECK(count(runner, "\n") > 20);
    const TempDir dir;
    write_file(dir.path + "/runner.py", runner);
    const string check =
        "import ast, sys\n"
        "with open(sys.argv[1], encoding='ascii') as file: source = file.read()\n"
        "tree = ast.parse(source, feature_version=(3, 7))\n"
        "compile(source, 'runner', 'exec')\n"
        "new = [node for node in ast.walk(tree) if type(node).__name__ in\n"
        "       ('NamedExpr', 'Match', 'TryStar', 'TypeAlias', 'TemplateStr')\n"
        "       or getattr(node, 'posonlyargs', None)\n"
        "       or isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)\n"
        "       and node.func.attr in ('removeprefix', 'removesuffix')]\n"
        "print([node.lineno for node in new] or 'fine')\n";
    CHECK(python(check, dir.path + "/runner.py") == "fine\n");
    write_file(dir.path + "/newer.py", "if (a := 1): pass\n");  // the check does bite
    const string said = python(check, dir.path + "/newer.py");
    CHECK((contains(said, "SyntaxError") || said == "[1]\n"));  // Python 3.9 parses it all the same
}

TEST_CASE("README.md has a row for every option, with its default") {
    std::istringstream readme(read_file("README.md"));
    vector<string> rows;
    for (string line; std::getline(readme, line);) {
        if (line.substr(0, 1) == "|") { rows.push_back(line); }
    }
    const SetEnv no_port("PORT", nullptr);
    Config defaults;
    REQUIRE(!parse_command_line({}, defaults));
    for (const Option& option : kOptions) {
        CAPTURE(string(option.text));
        const auto row = std::find_if(rows.begin(), rows.end(), [&](const string& line) {
            return line.find("`--" + string(option.name()) + "`") <
                   line.find('|', 1);  // its first column
        });
        REQUIRE((row != rows.end()));
        CAPTURE(*row);
        const string value = option.get != nullptr ? option.get(defaults) : "";
        if (!value.empty()) { CHECK(contains(*row, "| `" + value + "` |")); }
    }
}

/// A version 2 header of the PROXY protocol.
string proxy_v2(char command, char family, const string& addresses) {
    const char size[] = {static_cast<char>(addresses.size() / 256),
                         static_cast<char>(addresses.size() % 256)};
    return "\r\n\r\n\0\r\nQUIT\n"s + command + family + string(size, 2) + addresses;
}

TEST_CASE("a PROXY header names the client, or is refused, whole or byte by byte") {
    const string v4 = "\x0a\0\0\x07\x7f\0\0\x01\x30\x39\0\x50"s;
    const string v6 = string(15, '\0') + "\x01" + string(15, '\0') + "\x02\xff\xff\0\x50"s;
    const struct {
        const char* name;
        string bytes;
        Parse expected;
        string peer = "-", port = "-";
    } cases[] = {
        {"version 1", "PROXY TCP4 10.0.0.7 127.0.0.1 12345 80\r\n", Parse::Done, "10.0.0.7",
         "12345"},
        {"IPv6", "PROXY TCP6 ::1 ::2 65535 80\r\n", Parse::Done, "::1", "65535"},
        {"unknown", "PROXY UNKNOWN\r\n", Parse::Done},
        {"unknown, with whatever", "PROXY UNKNOWN ffff:f...f:ffff a b c\r\n", Parse::Done},
        {"a request", "GET / HTTP/1.1\r\n", Parse::Done},
        {"a request that begins alike", "PROXX / HTTP/1.1\r\n", Parse::Done},
        {"an empty line first", "\r\nGET / HTTP/1.1\r\n", Parse::Done},
        {"another family", "PROXY UDP4 10.0.0.7 127.0.0.1 12345 80\r\n", Parse::Bad},
        {"the wrong family", "PROXY TCP6 10.0.0.7 127.0.0.1 12345 80\r\n", Parse::Bad},
        {"a bad address", "PROXY TCP4 10.0.0.777 127.0.0.1 12345 80\r\n", Parse::Bad},
        {"a network", "PROXY TCP4 10.0.0.0/8 127.0.0.1 12345 80\r\n", Parse::Bad},
        {"a NUL and a variable", "PROXY TCP4 10.0.0.7\0HTTP_X\0y 127.0.0.1 12345 80\r\n"s,
         Parse::Bad},
        {"a NUL in the destination", "PROXY TCP4 10.0.0.7 127.0.0.1\0 12345 80\r\n"s, Parse::Bad},
        {"a bad destination", "PROXY TCP4 10.0.0.7 x 12345 80\r\n", Parse::Bad},
        {"a signed port", "PROXY TCP4 10.0.0.7 127.0.0.1 +1 80\r\n", Parse::Bad},
        {"a port too high", "PROXY TCP4 10.0.0.7 127.0.0.1 65536 80\r\n", Parse::Bad},
        {"a destination port too high", "PROXY TCP4 10.0.0.7 127.0.0.1 1 65536\r\n", Parse::Bad},
        {"a port missing", "PROXY TCP4 10.0.0.7 127.0.0.1 12345\r\n", Parse::Bad},
        {"a word more", "PROXY TCP4 10.0.0.7 127.0.0.1 12345 80 90\r\n", Parse::Bad},
        {"two blanks", "PROXY TCP4  10.0.0.7 127.0.0.1 12345 80\r\n", Parse::Bad},
        {"nothing", "PROXY \r\n", Parse::Bad},
        {"the end of no line", "PROXY UNKNOWN " + string(91, 'x') + "\r\n", Parse::Done},
        {"too long", "PROXY UNKNOWN " + string(92, 'x') + "\r\n", Parse::Bad},
        {"half of one", "PROXY TCP4 10.0", Parse::NeedMore},
        {"version 2", proxy_v2('\x21', '\x11', v4), Parse::Done, "10.0.0.7", "12345"},
        {"with more in it", proxy_v2('\x21', '\x11', v4 + "\x04\0\1x"s), Parse::Done, "10.0.0.7",
         "12345"},
        {"version 2, IPv6", proxy_v2('\x21', '\x21', v6), Parse::Done, "::1", "65535"},
        {"LOCAL", proxy_v2('\x20', '\0', ""), Parse::Done},
        {"LOCAL with addresses", proxy_v2('\x20', '\x11', v4), Parse::Done},
        {"unspecified", proxy_v2('\x21', '\0', "abc"), Parse::Done},
        {"unix sockets", proxy_v2('\x21', '\x31', string(216, 'x')), Parse::Done},
        {"another version", proxy_v2('\x11', '\x11', v4), Parse::Bad},
        {"another command", proxy_v2('\x22', '\x11', v4), Parse::Bad},
        {"another family", proxy_v2('\x21', '\x41', v4), Parse::Bad},
        {"another transport", proxy_v2('\x21', '\x13', v4), Parse::Bad},
        {"addresses cut short", proxy_v2('\x21', '\x11', v4.substr(1)), Parse::Bad},
        {"half of version 2", proxy_v2('\x21', '\x11', v4).substr(0, 20), Parse::NeedMore},
        {"half of its start", "\r\n\r\n\0\r\n"s, Parse::NeedMore},
    };
    for (const auto& row : cases) {
        CAPTURE(row.name);
        const bool header =
            row.bytes.substr(0, 5) == "PROXY" || row.bytes.substr(0, 4) == "\r\n\r\n";
        seed(4, row.bytes);
        for (const size_t step : {row.bytes.size(), size_t{1}}) {
            Endpoints ends{"", "", "-", "-"};
            Parse parsed = Parse::NeedMore;
            size_t fed = 0, left = 0;
            while (parsed == Parse::NeedMore && fed < row.bytes.size()) {
                fed += step;
                string_view in = string_view(row.bytes).substr(0, fed);
                parsed = take_proxy_header(in, ends);
                left = in.size();
            }
            CHECK(parsed == row.expected);
            if (parsed != Parse::Done) { continue; }
            CHECK(left == (header ? 0 : fed));
            CHECK(ends.peer == row.peer);
            CHECK(ends.peer_port == row.port);
        }
    }
}

TEST_CASE("whose rights workers have: by number nothing is looked up, but for a group") {
    if (::geteuid() != 0) {
        MESSAGE("not run: only root becomes someone else");
        return;
    }
    struct Row {
        string user, group, name;  // the name decides on further groups: "": on none
        uid_t uid;
        gid_t gid;
    };
    const struct passwd nobody = *::getpwnam("nobody");
    const uid_t uid = nobody.pw_uid;
    const gid_t gid = nobody.pw_gid;
    const Row rows[] = {
        {"", "", "", 0, ::getegid()},
        {"", to_string(gid), "", 0, gid},
        {"nobody", "", "nobody", uid, gid},
        {"nobody", "7", "nobody", uid, 7},
        {to_string(uid), "", "nobody", uid, gid},
        {to_string(uid), "7", "", uid, 7},
        {"424242", "424243", "", 424242, 424243},
    };
    for (const Row& row : rows) {
        CAPTURE(row.user + ":" + row.group);
        Config config;
        config.user = row.user, config.group = row.group;
        CHECK(resolve_user(config).text == "");
        CHECK(config.user == row.name);
        CHECK((config.uid == row.uid && config.gid == row.gid));
    }
}

TEST_SUITE_END();

// --- requests: every sentence of the rules, at a real server ----------------
TEST_SUITE_BEGIN("http");

using namespace std::string_literals;

/// Answers with its environ, a line for each text in it, and the body it read.
constexpr const char* kProbe = R"py(
def app(environ, start_response):
    body = environ["wsgi.input"].read()
    print("app saw", ascii(environ["RAW_URI"]))
    lines = ["%s=%s" % item for item in environ.items() if isinstance(item[1], str)]
    lines.append("body=" + body.decode("latin-1"))
    data = ("\n" + "\n".join(lines) + "\n").encode("latin-1")
    start_response("200 OK", [("Content-Length", str(len(data)))])
    return [data]
)py";

string field(const Reply& reply, const string& name) {
    const auto found = reply.fields.find(name);
    return found != reply.fields.end() ? found->second : "";
}

bool has_line(const string& text, const string& line) { return contains(text, "\n" + line + "\n"); }

/// A request on HTTP/1.1, from its line without the version, further fields and a body.
string http(const string& line, const string& fields = "", const string& body = "") {
    return line + " HTTP/1.1\r\nHost: x\r\n" + fields + "\r\n" + body;
}

/// A request with a Content-Length.
string sized(const string& line, const string& body, const string& fields = "") {
    return http(line, fields + "Content-Length: " + to_string(body.size()) + "\r\n", body);
}

string chunks(const string& body) { return http("POST /", "Transfer-Encoding: chunked\r\n", body); }

/// As request(), for a connection that has to end in order: a reset can take an answer with it.
Reply exchange(Client client, string_view bytes, bool half_close = false) {
    CHECK(client.send(bytes));
    if (half_close) { client.half_close(); }
    Reply reply(client.read_all());
    CHECK_FALSE(client.was_reset);
    return reply;
}

/// What the server says in its own name: complete, closed, once each field, nothing but itself.
void check_error_page(const Reply& reply, int status, bool body = true) {
    INFO("answer: ", reply.raw);
    CHECK(reply.status == status);
    CHECK(field(reply, "connection") == "close");
    CHECK(count(reply.head, "\nDate: ") == 1);
    CHECK(count(reply.head, "\nServer: ") == 1);
    CHECK(field(reply, "content-type").substr(0, 5) == "text/");
    CHECK(std::atoi(field(reply, "content-length").c_str()) > 0);
    CHECK((body ? reply.whole : reply.body.empty()));
}

struct RequestRow {
    string title, bytes;
    int status = 200;
};

/// Sends every row to one server: the app sees the good ones, each gets an answer and a log line.
void check_rows(const vector<RequestRow>& rows, const vector<string>& options = {}) {
    vector<string> args{"-w", "1"};
    args.insert(args.end(), options.begin(), options.end());
    const Server server(kProbe, args);
    size_t good = 0;
    for (const RequestRow& row : rows) {
        CAPTURE(row.title);
        const bool head_only = row.bytes.compare(0, 4, "HEAD") == 0;
        const Reply reply = exchange(Client(server), row.bytes);
        if (row.status == 200) {
            CHECK(reply.status == 200);
            ++good;
        } else {
            check_error_page(reply, row.status, !head_only);
        }
    }
    CHECK(get(server, "/last").status == 200);
    CHECK(server.log_has("app saw '/last'"));
    CHECK(count(server.log(), "app saw") == good + 1);
    CHECK(wait_for([&] { return count(server.access(), "\n") == rows.size() + 1; }));
    CHECK(count(server.log(), "[WARNING] ") == rows.size() - good);  // and no ERROR
    CHECK_FALSE(contains(server.log(), "[ERROR]"));
}

TEST_CASE("methods, targets and versions that are refused, and those that are not") {
    const string end = "\r\nHost: x\r\n\r\n";
    check_rows({
        {"a method of two letters", http("GE /"), 400},
        {"a method of three", http("GET /")},
        {"a method of twenty", http("ABCDEFGHIJKLMNOPQRST /")},
        {"a method of twenty-one", http("ABCDEFGHIJKLMNOPQRSTU /"), 400},
        {"a method in lower case", http("get /"), 400},
        {"a method with one lower-case letter", http("GEt /"), 400},
        {"a method that is a token", http("M-SEARCH /")},
        {"a method that is no token", http("G@T /"), 400},
        {"CONNECT", http("CONNECT x:443"), 501},
        {"a relative target", http("GET index.html"), 400},
        {"no target", http("GET "), 400},
        {"a blank in the target", http("GET /a b"), 400},
        {"a tab in the target", http("GET /a\tb"), 400},
        {"a control character in the target", http("GET /a\x01"), 400},
        {"DEL in the target", http("GET /a\x7f"), 400},
        {"NUL in the target", http("GET /a\0b"s), 400},
        {"a bare CR in the target", http("GET /a\rb"), 400},
        {"%00 in the path", http("GET /a%00b"), 400},
        {"%00 in the query", http("GET /a?%00b")},
        {"userinfo in the target", http("GET http://user@x/"), 400},
        {"a target with a malformed host", http("GET http://[::1/"), 400},
        {"a target with a port that is none", http("GET http://x:y/"), 400},
        {"another scheme", http("GET ftp://x/"), 400},
        {"* with GET", http("GET *"), 400},
        {"* with OPTIONS", http("OPTIONS *")},
        {"HTTP/1.0", "GET / HTTP/1.0\r\n\r\n"},
        {"HTTP/1.7", "GET / HTTP/1.7" + end},
        {"HTTP/2.0", "GET / HTTP/2.0" + end, 505},
        {"the preface of HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505},
        {"HTTP/0.9", "GET / HTTP/0.9" + end, 505},
        {"no version", "GET /" + end, 400},
        {"a version without a number", "GET / HTTP/" + end, 400},
        {"another protocol", "GET / ICY/1.1" + end, 400},
        {"one empty line before the request line", "\r\n" + http("GET /")},
        {"two empty lines before the request line", "\r\n\r\n" + http("GET /"), 400},
    });
}

TEST_CASE("fields that are refused, and those that are not") {
    const auto one = [](const string& line) { return http("GET /", line + "\r\n"); };
    const auto host = [](const string& value) {
        return "GET / HTTP/1.1\r\nHost: " + value + "\r\n\r\n";
    };
    check_rows({
        {"no Host", "GET / HTTP/1.1\r\n\r\n"},
        {"an empty Host", host("")},
        {"a Host with a port", host("example.org:8080")},
        {"a Host of sub-delims", host("a!$&'()*+,;=b")},
        {"a v6 Host", host("[::1]:80")},
        {"two Hosts", one("Host: x"), 400},
        {"two Hosts, and HEAD", "HEAD / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400},
        {"a blank in Host", host("a b"), 400},
        {"userinfo in Host", host("u@a"), 400},
        {"a path in Host", host("a/b"), 400},
        {"a Host with a port that is none", host("a:x"), 400},
        {"a Host with two ports", host("a:1:2"), 400},
        {"a Host without the second bracket", host("[::1"), 400},
        {"two Content-Types", one("Content-Type: a/b\r\nContent-Type: a/b"), 400},
        {"obs-fold", one("A: b\r\n c"), 400},
        {"obs-fold with a tab", one("A: b\r\n\tc"), 400},
        {"a blank before the first field", "GET / HTTP/1.1\r\n Host: x\r\n\r\n", 400},
        {"a blank before the colon", one("A : b"), 400},
        {"an empty name", one(": b"), 400},
        {"no colon", one("A"), 400},
        {"a name that is no token", one("A(b): c"), 400},
        {"a bare CR in a value", one("A: b\rc"), 400},
        {"a bare LF in a value", one("A: b\nc"), 400},
        {"a bare LF at a line's end", "GET / HTTP/1.1\nHost: x\r\n\r\n", 400},
        {"a bare LF at the head's end", "GET / HTTP/1.1\r\nHost: x\r\n\n", 400},
        {"NUL in a value", one("A: b\0c"s), 400},
        {"ESC in a value", one("A: b\x1b"), 400},
        {"a tab in a value", one("A: b\tc")},
        {"bytes above ASCII in a value", one("A: \xe9")},
        {"another expectation", one("Expect: 200-ok"), 417},
    });
}

TEST_CASE("framings that are refused, and those that are not") {
    const auto length = [](const string& value) {
        return http("POST /", "Content-Length: " + value + "\r\n", "12345");
    };
    const auto coding = [](const string& value, const string& fields = "") {
        return http("POST /", fields + "Transfer-Encoding: " + value + "\r\n", "0\r\n\r\n");
    };
    const string chunked = "Transfer-Encoding: chunked\r\n", last = "\r\n0\r\n\r\n";
    check_rows({
        {"a Content-Length", length("5")},
        {"a list of Content-Lengths", length("5, 5"), 400},
        {"a Content-Length with a plus", length("+5"), 400},
        {"a negative Content-Length", length("-5"), 400},
        {"a blank inside the Content-Length", length("5 5"), 400},
        {"a hexadecimal Content-Length", length("0x5"), 400},
        {"an empty Content-Length", length(""), 400},
        {"two Content-Lengths", length("5\r\nContent-Length: 5"), 400},
        {"a Content-Length of 2^63", length("9223372036854775808"), 400},
        {"a Content-Length of 2^63 - 1: a number, too large", length("9223372036854775807"), 413},
        {"a body over the default of 1 GiB", length("1073741825"), 413},
        {"chunked", coding("chunked")},
        {"chunked in capitals", coding("CHUNKED")},
        {"chunked on HTTP/1.0", "POST / HTTP/1.0\r\n" + chunked + "\r\n0\r\n\r\n", 400},
        {"chunked with a Content-Length", coding("chunked", "Content-Length: 5\r\n"), 400},
        {"chunked before a Content-Length", coding("chunked\r\nContent-Length: 5"), 400},
        {"chunked twice", coding("chunked, chunked"), 400},
        {"chunked in two fields", coding("chunked", chunked), 400},
        {"chunked not last", coding("chunked, gzip"), 400},
        {"a malformed coding", coding("chun ked"), 400},
        {"an empty coding", coding(""), 400},
        {"another coding", coding("gzip"), 501},
        {"another coding before chunked", coding("gzip, chunked"), 501},
        {"identity", coding("identity"), 501},
        {"chunks", chunks("3\r\nabc\r\nA\r\n0123456789\r\n0\r\n\r\n")},
        {"sixteen digits", chunks("0000000000000003\r\nabc" + last)},
        {"seventeen digits", chunks("00000000000000003\r\nabc" + last), 400},
        {"a size with 0x", chunks("0x3\r\nabc" + last), 400},
        {"a size with a sign", chunks("+3\r\nabc" + last), 400},
        {"no size", chunks("\r\nabc" + last), 400},
        {"an extension", chunks("3;a=b;c=\"d\"\r\nabc" + last)},
        {"a size line of 8 KiB", chunks("3;" + string(8190, 'a') + "\r\nabc" + last)},
        {"a size line over 8 KiB", chunks("3;" + string(8191, 'a') + "\r\nabc" + last), 400},
        {"a size line without CR", chunks("3\nabc" + last), 400},
        {"chunk data without CRLF", chunks("3\r\nabc0\r\n\r\n"), 400},
        {"chunk data with LF alone", chunks("3\r\nabc\n0\r\n\r\n"), 400},
        {"a trailer", chunks("3\r\nabc\r\n0\r\nX-Sum: 1\r\n\r\n")},
        {"a folded trailer", chunks("0\r\nA: b\r\n c\r\n\r\n"), 400},
        {"a trailer without CR", chunks("0\r\nA: b\n\r\n"), 400},
        {"Content-Length in the trailers", chunks("0\r\nContent-Length: 3\r\n\r\n"), 400},
        {"Transfer-Encoding in the trailers", chunks("0\r\nTransfer-Encoding: a\r\n\r\n"), 400},
        {"Host in the trailers", chunks("0\r\nHost: y\r\n\r\n"), 400},
        {"a long trailer", chunks("0\r\nA: " + string(9000, 'a') + "\r\n\r\n"), 431},
    });
}

/// "F: 1" n times.
string many_fields(size_t n, const string& field_line = "F: 1") {
    string text;
    for (size_t i = 0; i < n; ++i) { text += field_line + "\r\n"; }
    return text;
}

TEST_CASE("limits: 414 for the request line, 431 for fields and trailers, 413 for the body") {
    const auto line = [](size_t n) { return http("GET /" + string(n - 14, 'a')); };
    const auto one = [](size_t n) { return http("GET /", "A: " + string(n - 3, 'b') + "\r\n"); };
    const string two_chunks = "4\r\nabcd\r\n4\r\nabcd\r\n0\r\n\r\n";
    check_rows(
        {
            {"a request line at its limit", line(60)},
            {"a request line over it", line(61), 414},
            {"a request line that never ends", "GET /" + string(4000, 'a'), 414},
            {"five fields", http("GET /", many_fields(4))},
            {"six fields", http("GET /", many_fields(5)), 431},
            {"fields with _ count", http("GET /", many_fields(5, "A_b: 1")), 431},
            {"a field at its limit", one(58)},
            {"a field over it", one(61), 431},
            {"a long field with _", http("GET /", "A_b: " + string(60, 'a') + "\r\n"), 431},
            {"a field that never ends", "GET / HTTP/1.1\r\nA: " + string(4000, 'a'), 431},
            {"HEAD, and a long field", "HEAD / HTTP/1.1\r\nA: " + string(99, 'a'), 431},
            {"a body at its limit", sized("POST /", "1234567")},
            {"a body over it", sized("POST /", "12345678"), 413},
            {"chunks at the limit", chunks("7\r\n1234567\r\n0\r\n\r\n")},
            {"chunks over it", chunks(two_chunks), 413},
            {"too many trailers", chunks("0\r\n" + many_fields(6) + "\r\n"), 431},
            {"a trailer over the limit", chunks("0\r\nA: " + string(60, 'b') + "\r\n\r\n"), 431},
        },
        {"--limit-request-line", "60", "--limit-request-fields", "5", "--limit-request-field_size",
         "60", "--limit-request-body=7"});
    check_rows(
        {
            {"0 for the line", http("GET /" + string(800'000, 'a'))},
            {"but for the cap on the head", http("GET /" + string(1'100'000, 'a')), 414},
            {"0 for a field: the default", one(8180)},
            {"and more", one(8200), 431},
            {"a great many fields", http("GET /", many_fields(150))},
            {"but for the cap", http("GET /", many_fields(150, "F: " + string(7500, 'a'))), 431},
        },
        {"--limit-request-line=0", "--limit-request-field_size=0", "--limit-request-fields=200"});
    check_rows(
        {
            {"a line beyond gunicorn's limits", line(19'000)},
            {"a field beyond them", one(19'000)},
            {"a line over the limit", line(20'001), 414},
            {"a field over the limit", one(20'003), 431},
        },
        {"--limit-request-line=20000", "--limit-request-field_size=20000"});
}

string local_port(const Client& client) {
    sockaddr_in address{};
    socklen_t size = sizeof address;
    ::getsockname(client.fd.get(), reinterpret_cast<sockaddr*>(&address), &size);
    return to_string(ntohs(address.sin_port));
}

TEST_CASE("the environ tells what the client sent") {
    struct Row {
        string title, bytes;
        vector<string> lines, absent;  // lines of the answer; beginnings of lines
    };
    const auto with = [](const string& fields) { return http("GET /", fields); };
    const string chunk = "Transfer-Encoding: chunked\r\n";
    const vector<Row> rows = {
        {"a target of everything",
         http("GET /a%20b/%C3%A9%2f?c=%20d+e#f?g"),
         {"REQUEST_METHOD=GET", "SCRIPT_NAME=", "PATH_INFO=/a b/\xc3\xa9/", "QUERY_STRING=c=%20d+e",
          "RAW_URI=/a%20b/%C3%A9%2f?c=%20d+e#f?g", "REQUEST_URI=/a%20b/%C3%A9%2f?c=%20d+e#f?g",
          "SERVER_PROTOCOL=HTTP/1.1", "HTTP_HOST=x", "wsgi.url_scheme=http"},
         {}},
        {"a fragment without a query",
         http("GET /a#b?c"),
         {"PATH_INFO=/a", "QUERY_STRING=", "RAW_URI=/a#b?c"},
         {}},
        {"malformed escapes", http("GET /%zz%4%"), {"PATH_INFO=/%zz%4%"}, {}},
        {"raw bytes", http("GET /\xe9\xff?\xe8"), {"PATH_INFO=/\xe9\xff", "QUERY_STRING=\xe8"}, {}},
        {"two slashes", http("GET //a//b"), {"PATH_INFO=//a//b"}, {}},
        {"the absolute form",
         http("GET http://real:81/p?q"),
         {"HTTP_HOST=real:81", "PATH_INFO=/p", "QUERY_STRING=q", "RAW_URI=http://real:81/p?q"},
         {}},
        {"the absolute form without Host",
         "GET http://real/p HTTP/1.1\r\n\r\n",
         {"HTTP_HOST=real", "PATH_INFO=/p"},
         {}},
        {"the absolute form without a path",
         http("GET http://real?q"),
         {"HTTP_HOST=real", "PATH_INFO=/", "QUERY_STRING=q"},
         {}},
        {"OPTIONS *", http("OPTIONS *"), {"PATH_INFO=*", "RAW_URI=*"}, {}},
        {"no Host", "GET / HTTP/1.1\r\n\r\n", {"PATH_INFO=/"}, {"HTTP_HOST"}},
        {"HTTP/1.0", "GET / HTTP/1.0\r\n\r\n", {"SERVER_PROTOCOL=HTTP/1.0"}, {}},
        {"HTTP/1.7 is served as 1.1", "GET / HTTP/1.7\r\n\r\n", {"SERVER_PROTOCOL=HTTP/1.1"}, {}},
        {"no Content-Length", http("GET /"), {"body="}, {"CONTENT_LENGTH", "HTTP_CONTENT_LENGTH"}},
        {"a Content-Length of 0", sized("GET /", ""), {"CONTENT_LENGTH=0", "body="}, {}},
        {"a body",
         sized("POST /", "ab\0c"s, "Content-Type: text/x\r\n"),
         {"CONTENT_LENGTH=4", "body=ab\0c"s, "CONTENT_TYPE=text/x"},
         {"HTTP_CONTENT_LENGTH", "HTTP_CONTENT_TYPE"}},
        {"chunks",
         chunks("3;x=y\r\nabc\r\n2\r\nde\r\n0\r\nX-Sum: 1\r\n\r\n"),
         {"CONTENT_LENGTH=5", "body=abcde"},
         {"HTTP_X_SUM", "HTTP_TRANSFER_ENCODING"}},
        {"no chunk", chunks("0\r\n\r\n"), {"CONTENT_LENGTH=0", "body="}, {}},
        {"names with _",
         with("A_B: 1\r\nContent_Length: 5\r\nX-Real: 2\r\n"),
         {"HTTP_X_REAL=2"},
         {"HTTP_A_B", "CONTENT_LENGTH", "HTTP_CONTENT_LENGTH"}},
        {"_ cannot stand for -", with("X_User: evil\r\nX-User: me\r\n"), {"HTTP_X_USER=me"}, {}},
        {"Proxy", with("Proxy: http://evil\r\nPROXY: x\r\n"), {"PATH_INFO=/"}, {"HTTP_PROXY"}},
        {"repeated fields", with("A: 1\r\nB: 2\r\na: 3\r\n"), {"HTTP_A=1,3", "HTTP_B=2"}, {}},
        {"two Cookies", with("Cookie: a=1\r\ncookie: b=2\r\n"), {"HTTP_COOKIE=a=1; b=2"}, {}},
        {"blanks around a value",
         with("A: \t b c \t\r\nB:d\r\nC:\r\n"),
         {"HTTP_A=b c", "HTTP_B=d", "HTTP_C="},
         {}},
        {"X-Forwarded-For is only a header",
         with("X-Forwarded-For: 9.9.9.9\r\n"),
         {"HTTP_X_FORWARDED_FOR=9.9.9.9", "REMOTE_ADDR=127.0.0.1"},
         {}},
    };
    const Server server(kProbe, {"-w", "1"});
    for (const Row& row : rows) {
        CAPTURE(row.title);
        const Reply reply = exchange(Client(server), row.bytes);
        CAPTURE(reply.body);
        CHECK(reply.status == 200);
        for (const string& line : row.lines) { CHECK_MESSAGE(has_line(reply.body, line), line); }
        for (const string& name : row.absent) {
            CHECK_MESSAGE(!contains(reply.body, "\n" + name + "="), name);
        }
    }
    Client client(server);
    client.send(http("GET /"));
    const string answer = client.read_all();
    CHECK(has_line(answer, "SERVER_NAME=127.0.0.1"));
    CHECK(has_line(answer, "SERVER_PORT=" + to_string(server.port())));
    CHECK(has_line(answer, "REMOTE_ADDR=127.0.0.1"));
    CHECK(has_line(answer, "REMOTE_PORT=" + local_port(client)));
}

TEST_CASE("on a unix socket the environ takes its names from Host, and there is no peer") {
    const TempDir dir;
    const string path = dir.path + "/sock";
    const Server server(kProbe, {"-w", "1", "-b", "unix:" + path});
    const auto ask = [&](const string& fields) {
        const string head = "GET / HTTP/1.1\r\n" + fields + "\r\n";
        const Reply reply = exchange(Client(path), head);
        CHECK(reply.status == 200);
        return reply.body;
    };
    const string body = ask("Host: example.org:81\r\n");
    CHECK(has_line(body, "SERVER_NAME=example.org"));
    CHECK(has_line(body, "SERVER_PORT=81"));
    CHECK(has_line(body, "HTTP_HOST=example.org:81"));
    CHECK(has_line(body, "REMOTE_ADDR="));
    CHECK(has_line(body, "REMOTE_PORT="));
    const string plain = ask("Host: example.org\r\n");
    CHECK(has_line(plain, "SERVER_NAME=example.org"));
    CHECK(has_line(plain, "SERVER_PORT=80"));
    CHECK(has_line(ask("Host: [::1]:81\r\n"), "SERVER_PORT=81"));
    CHECK(has_line(ask(""), "SERVER_PORT=80"));
    CHECK(has_line(ask("Host:\r\n"), "SERVER_NAME=localhost"));  // never empty (PEP 3333)
    CHECK(has_line(ask("Host: h\r\nX-Forwarded-Proto: https\r\n"), "SERVER_PORT=443"));
    REQUIRE(wait_for([&] { return count(server.access(), "\n") == 6; }));
    CHECK_MESSAGE(server.access().compare(0, 5, " - - ") == 0, server.access());
}

TEST_CASE("SCRIPT_NAME comes from the process environment and is cut from PATH_INFO") {
    const Server server(kProbe, {"-w", "1", "-e", "SCRIPT_NAME=/pre"});
    const vector<vector<string> > rows = {
        {"/pre/a%20b", "SCRIPT_NAME=/pre", "PATH_INFO=/a b", "RAW_URI=/pre/a%20b"},
        {"/pre", "SCRIPT_NAME=/pre", "PATH_INFO=", "RAW_URI=/pre"},
        {"/prefix", "PATH_INFO=/prefix", "RAW_URI=/prefix"},
    };
    for (const vector<string>& row : rows) {
        const Reply reply = get(server, row[0]);
        CAPTURE(reply.body);
        for (size_t i = 1; i < row.size(); ++i) {
            CHECK_MESSAGE(has_line(reply.body, row[i]), row[i]);
        }
    }
}

/// NAME=VALUE of a process, as it was started.
std::set<string> environment_of(pid_t pid) {
    std::set<string> found;
    const string text = read_file("/proc/" + to_string(pid) + "/environ");
    string_view rest = text;
    while (!rest.empty()) { found.emplace(cut(rest, '\0')); }
    return found;
}

TEST_CASE("the app's environment is the server's and -e, and no settings") {
    const vector<string> taken = {"LISTEN_PID=1",     "LISTEN_FDS=1",           "LISTEN_FDNAMES=a",
                                  "LISTEN_PIDFDID=7", "NOTIFY_SOCKET=/nowhere", "WATCHDOG_PID=1",
                                  "WATCHDOG_USEC=1"};
    vector<string> env = taken;
    env.emplace_back("TEST_OLD=1");
    env.emplace_back("WEB_CONCURRENCY=1");
    const TempDir lib;
    write_file(lib.path + "/lib.py", "name = 'lib'\n");
    const Server server(R"py(
import os, sys, lib
def app(environ, start_response):
    start_response("200 OK", [])
    return [("%s %s %s" % (os.getcwd(), sys.path, os.environ["TEST_OLD"])).encode()]
)py",
                        {"--pythonpath", lib.path, "-e", "TEST_OLD=2", "--env=TEST_NEW=a=b"}, env);
    REQUIRE(server.wait_ready_workers(1));
    REQUIRE(server.workers().size() == 1);  // $WEB_CONCURRENCY
    std::set<string> expected = environment_of(server.pid);
    for (const string& pair : taken) { CHECK(expected.erase(pair) == 1); }
    CHECK(expected.erase("TEST_OLD=1") == 1);
    expected.insert("TEST_OLD=2");
    expected.insert("TEST_NEW=a=b");
    expected.insert("SERVER_SOFTWARE=" + (string("server/") + kVersion));  // for web.py
    REQUIRE(server.runners().size() == 1);
    const std::set<string> found = environment_of(server.runner());
    const std::set<string> shell = {"PATH", "PWD", "OLDPWD", "SHLVL", "_"};
    for (const string& pair : expected) {
        if (shell.count(pair.substr(0, pair.find('='))) == 0) {
            CHECK_MESSAGE(found.count(pair) == 1, pair);
        }
    }
    for (const string& pair : taken) { CHECK_MESSAGE(found.count(pair) == 0, pair); }
    for (const string& pair : found) {
        const bool ours = expected.count(pair) == 1;
        const bool setting = contains(pair, "app:app") || contains(pair, lib.path);
        CHECK_MESSAGE((ours || shell.count(pair.substr(0, pair.find('='))) == 1), pair);
        CHECK_FALSE_MESSAGE(setting, pair);
    }
    const string cwd = server.dir.path, start = cwd + " ['" + lib.path + "', '" + cwd + "', ";
    const string body = get(server).body;
    CHECK_MESSAGE(body.compare(0, start.size(), start) == 0, body);
    CHECK(body.substr(body.size() - 2) == " 2");
}

TEST_CASE("modules come from --pythonpath, then the directory, then wherever Python looks") {
    for (const string safe : {"", "1"}) {  // set: Python puts no directory of its own in front
        CAPTURE(safe);
        const Server server(R"py(
import sys
def app(environ, start_response):
    start_response("200 OK", [])
    return [repr(sys.path).encode()]
)py",
                            {"-w", "1", "--pythonpath", "/a,b"},
                            {"PYTHONPATH=/more", "PYTHONSAFEPATH=" + safe});
        const string cwd = server.dir.path, body = get(server).body;
        const string start = "['/a', '" + cwd + "/b', '" + cwd + "', '/more', '/";
        CHECK_MESSAGE(body.compare(0, start.size(), start) == 0, body);
    }
}

TEST_CASE("the runner needs no module that Debian's python3-minimal lacks") {
    const TempDir lib;
    for (const char* name : {"wsgiref", "json", "http", "socketserver", "html"}) {
        write_file(lib.path + "/" + name + ".py", "raise ImportError\n");
    }
    const Server server(kHello, {"-w", "1", "--threads", "2"}, {"PYTHONPATH=" + lib.path});
    CHECK(get(server).body == "hello\n");
}

// --- clients that take their time, leave early or say too much --------------

TEST_CASE("the header clock runs from accept, the body clock from the last byte") {
    const Server server(kProbe, {"-w", "1", "-t", "1", "--header-timeout", "1"});
    const Time start = Clock::now();
    Client silent(server), trickled_head(server), stopped_head(server);
    Client stopped_body(server), stopped_chunk(server), trickled_body(server);
    stopped_head.send("GET /stopped HTTP/1.1\r\n");
    stopped_body.send("POST /body HTTP/1.1\r\nContent-Length: 10\r\n\r\n12345");
    stopped_chunk.send("POST /chunk HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n12");
    trickled_body.send("POST /slow HTTP/1.1\r\nContent-Length: 9\r\n\r\n");
    trickled_head.send("GET /trickled HTTP/1.1\r\nA: ");
    double head_time = 0;
    for (int i = 0; i < 9; ++i) {  // 200 ms apart: 1.8 s in all, never a second without a byte
        for (int j = 0; j < 4; ++j) {
            if (head_time == 0 && trickled_head.readable(50ms)) {
                head_time = seconds_since(start);
            }
            if (head_time == 0) { trickled_head.send("b"); }
            if (head_time != 0) { trickled_body.readable(50ms); }
        }
        REQUIRE(trickled_body.send("x"));
    }
    CHECK(head_time > 0.9);
    CHECK(head_time < 1.7);
    for (Client* client : {&trickled_head, &stopped_head, &stopped_body, &stopped_chunk}) {
        check_error_page(Reply(client->read_all()), 408);
        CHECK_FALSE(client->was_reset);
    }
    CHECK(silent.read_all() == "");
    CHECK_FALSE(silent.was_reset);
    const Reply slow(trickled_body.read_all());
    CHECK(slow.status == 200);
    CHECK(has_line(slow.body, "body=xxxxxxxxx"));
    CHECK(server.access_has("/slow"));
    CHECK(count(server.access(), "\n") == 5);  // none for the silent one
    CHECK(count(server.access(), " 408 ") == 4);
    CHECK(count(server.log(), " 408 to ") == 4);
    CHECK(count(server.log(), "app saw") == 1);
}

TEST_CASE("an error page arrives although the client still sends") {
    const Server server(kProbe, {"-w", "1", "--limit-request-body", "1000"});
    const string megabytes(8'000'000, 'x');
    const string chunked = "Transfer-Encoding: chunked\r\n";
    const vector<RequestRow> rows = {
        {"a body that is announced", sized("POST /", megabytes), 413},
        {"chunks", chunks("7A1200\r\n" + megabytes + "\r\n0\r\n\r\n"), 413},
        {"a head", "GET /" + megabytes, 414},
        {"a bad request", sized("POST /", megabytes, "A : b\r\n"), 400},
        {"a bad chunk", chunks("x\r\n" + megabytes), 400},
        {"HTTP/3", "GET / HTTP/3\r\n\r\n" + megabytes, 505},
    };
    for (const RequestRow& row : rows) {
        CAPTURE(row.title);
        Client client(server);
        CHECK(client.send(row.bytes));
        check_error_page(Reply(client.read_all()), row.status);
        CHECK_FALSE(client.was_reset);
    }
    CHECK_FALSE(contains(server.log(), "app saw"));
    CHECK(server.access_has("505"));
    CHECK(server.log().size() + server.access().size() < 20'000);  // no line as long as that head
}

TEST_CASE("100 Continue goes out after head and limits, to HTTP/1.1 only") {
    const Server server(kProbe, {"-w", "1", "--limit-request-body=2000000000"});
    const string interim = "HTTP/1.1 100 Continue\r\n\r\n", expect = "Expect: 100-continue\r\n";
    const auto has_interim = [&](const string& text) { return text.size() >= interim.size(); };
    for (const char* value : {"100-continue", "100-Continue"}) {
        Client client(server);
        client.send(http("POST /", string("Expect: ") + value + "\r\nContent-Length: 3\r\n"));
        REQUIRE(client.read_until(has_interim) == interim);
        client.send("abc");
        const Reply reply(client.read_all());
        CHECK(reply.status == 200);
        CHECK(has_line(reply.body, "body=abc"));
    }
    Client chunked(server);
    chunked.send(http("POST /", expect + "Transfer-Encoding: chunked\r\n"));
    REQUIRE(chunked.read_until(has_interim) == interim);
    chunked.send("3\r\nabc\r\n0\r\n\r\n");
    CHECK(has_line(Reply(chunked.read_all()).body, "body=abc"));

    Client at_once(server);
    at_once.send(http("POST /", expect + "Content-Length: 3\r\n") + "abc");
    const string both = at_once.read_all();
    CHECK(both.substr(0, interim.size()) == interim);
    CHECK(has_line(Reply(both.substr(interim.size())).body, "body=abc"));

    Client old(server);
    old.send("POST / HTTP/1.0\r\n" + expect + "Content-Length: 3\r\n\r\n");
    CHECK_FALSE(old.readable(100ms));
    old.send("abc");
    CHECK(Reply(old.read_all()).status == 200);

    check_error_page(
        exchange(Client(server), http("POST /", expect + "Content-Length: 2000000001\r\n")), 413);
    check_error_page(exchange(Client(server), http("POST /", expect + "A : b\r\n")), 400);
    CHECK(exchange(Client(server), sized("POST /", "", expect)).status == 200);
}

TEST_CASE("a limit of 0 for the body is none, and the default is 1 GiB") {
    struct Row {
        vector<string> args;
        const char *length, *answer;
    };
    const vector<Row> rows = {{{"--limit-request-body=0"}, "9000000000000", "HTTP/1.1 100"},
                              {{}, "1073741824", "HTTP/1.1 100"},
                              {{}, "1073741825", "HTTP/1.1 413"}};
    for (const Row& row : rows) {
        const Server server(kProbe, row.args);
        Client client(server);
        client.send(http("POST /",
                         string("Expect: 100-continue\r\nContent-Length: ") + row.length + "\r\n"));
        CHECK(client.read_until([](const string& s) { return s.size() >= 12; }).substr(0, 12) ==
              row.answer);
    }
}

/// Says that it runs, and goes on when a file "go" is there.
constexpr const char* kWaiting = R"py(
import os, time
def app(environ, start_response):
    body = environ["wsgi.input"].read()
    print("app runs", environ["PATH_INFO"], flush=True)
    for _ in range(1000):
        if os.path.exists("go"):
            break
        time.sleep(0.01)
    start_response("200 OK", [])
    return [b"got %d" % len(body)]
)py";

TEST_CASE("EOF is a half-close, a reset is a client that has gone, more is read and dropped") {
    Server server(kWaiting, {"-w", "1"});
    Client half(server);
    half.send(sized("POST /half", "abc"));
    half.half_close();
    REQUIRE(server.log_has("app runs /half"));
    CHECK_FALSE(half.readable(50ms));
    write_file(server.dir.path + "/go", "");
    const Reply reply(half.read_all());
    CHECK(reply.status == 200);
    CHECK(reply.body == "got 3");
    CHECK(reply.whole);

    ::unlink((server.dir.path + "/go").c_str());
    Client liar(server);  // it sends what it said it would not, but while the application runs
    liar.send(http("GET /more", "Connection: close\r\n"));
    REQUIRE(server.log_has("app runs /more"));
    liar.send(http("GET /second"));
    CHECK_FALSE(liar.readable(50ms));
    write_file(server.dir.path + "/go", "");
    const Reply told(liar.read_all());
    CHECK(told.status == 200);
    CHECK(told.whole);
    CHECK_FALSE(liar.was_reset);

    ::unlink((server.dir.path + "/go").c_str());
    Client free(server);  // it has promised nothing, and the worker has both at once before it
    free.send(http("GET /free"));
    REQUIRE(server.log_has("app runs /free"));
    REQUIRE(::kill(server.worker(), SIGSTOP) == 0);
    free.send(http("GET /second"));
    write_file(server.dir.path + "/go", "");
    CHECK_FALSE(free.readable(100ms));
    REQUIRE(::kill(server.worker(), SIGCONT) == 0);
    CHECK(server.access_has("GET /free HTTP/1.1\" 200 "));
    ::poll(nullptr, 0, 50);  // so that a reset, if there is one, has come before we read
    const Reply answer(free.read_all());
    CHECK(answer.status == 200);
    CHECK(answer.whole);
    CHECK_FALSE(free.was_reset);
    CHECK(free.send("x"));  // after a reset this would fail, even where the FIN was read first

    ::unlink((server.dir.path + "/go").c_str());
    Client gone(server);
    gone.send(http("GET /gone"));
    REQUIRE(server.log_has("app runs /gone"));
    gone.reset();
    CHECK(server.access_has("GET /gone HTTP/1.1\" 499 "));
    write_file(server.dir.path + "/go", "");
    CHECK(get(server).status == 200);

    const vector<string> early = {"GET",
                                  "GET /cut HTTP/1.1\r\nHost: x\r\n",
                                  "POST /cut HTTP/1.1\r\nContent-Length: 9\r\n\r\n12345",
                                  chunks("5\r\n123"),
                                  chunks("5\r\n12345\r\n"),
                                  chunks("0\r\n"),
                                  chunks("0\r\nA: b\r\n")};
    const size_t runs = count(server.log(), "app runs");
    for (const string& bytes : early) {
        CAPTURE(bytes);
        check_error_page(exchange(Client(server), bytes, true), 400);
    }
    CHECK(exchange(Client(server), "", true).raw == "");
    Client(server).reset();  // who sent nothing has no line
    CHECK(get(server).status == 200);
    CHECK(count(server.log(), "app runs") == runs + 1);
    CHECK(wait_for([&] { return count(server.access(), "\n") == early.size() + 6; }));
}

TEST_CASE("pipelined bytes are read and dropped") {
    const Server server(kProbe, {"-w", "1"});
    const string more(4'000'000, 'y');
    for (const string& second : {http("GET /second"), sized("POST /second", more), more}) {
        Client client(server);
        const bool sent = client.send(http("GET /first") + second);
        CHECK(sent);
        const string text = client.read_all();
        CHECK_FALSE(client.was_reset);
        CHECK(Reply(text).status == 200);
        CHECK(Reply(text).whole);
        CHECK(has_line(text, "PATH_INFO=/first"));
    }
    Client late(server);  // what comes after the answer finds no reset either
    late.send(http("POST /first", "Content-Length: 1\r\n", "a" + http("GET /second")));
    const string text = late.read_until([](const string& s) { return contains(s, "\nbody=a\n"); });
    CHECK(late.send(more));
    CHECK(late.read_all() == "");
    CHECK_FALSE(late.was_reset);
    CHECK(get(server, "/last").status == 200);
    CHECK(count(server.log(), "app saw") == 5);
    CHECK_FALSE(contains(server.log(), "app saw '/second'"));
}

TEST_CASE("who has sent more and half-closed is not waited for once the response has gone") {
    Server server(kWaiting, {"-w", "1"});
    Client client(server);
    client.send(http("GET /first") + http("GET /second"));
    client.half_close();
    REQUIRE(server.log_has("app runs /first"));
    CHECK_FALSE(client.readable(50ms));  // it is known by then that no more will come
    write_file(server.dir.path + "/go", "");
    CHECK(Reply(client.read_all()).whole);
    server.signal(SIGTERM);
    CHECK(server.wait_end(3s));  // who lingers may be silent for 5 s
}

TEST_CASE("bytes that come while a response ends do not cost the client that response") {
    const Server server(kHello, {"-w", "1"});
    Random random;
    int good = 0;
    for (int i = 0; i < 1000; ++i) {
        Client client(server);
        client.send(http("GET /"));
        const Time until = Clock::now() + microseconds(random.below(300));
        while (Clock::now() < until) {}
        client.send("\r\n");
        good += Reply(client.read_all()).body == "hello\n" ? 1 : 0;
    }
    CHECK(good == 1000);
}

// --- responses: each request brings the Python that answers it --------------

constexpr const char* kScripted = R"py(
import io, os, sys, time
kept = {}
def app(environ, start_response):
    source = environ["wsgi.input"].read(int(environ["HTTP_X_SCRIPT"]))
    scope = dict(globals(), environ=environ, start=start_response, out=[b""])
    exec(source, scope)
    return scope["out"]
)py";

/// A request whose body is the script, with `more` behind it.
string scripted(const string& script, const string& line = "POST / HTTP/1.1",
                const string& more = "") {
    return line + "\r\nHost: x\r\nX-Script: " + to_string(script.size()) +
           "\r\nContent-Length: " + to_string(script.size() + more.size()) + "\r\n\r\n" + script +
           more;
}

/// The answer to a script; `log` gets what the error log gained, once `part` is in it.
Reply answer(const Server& server, const string& script, const string& part = "",
             const string& line = "POST / HTTP/1.1") {
    const size_t before = server.log().size();
    const Reply reply = request(server.port(), scripted(script, line));
    const auto gained = [&] { return server.log().substr(before); };
    const auto lower_case = [](string text) {
        std::transform(text.begin(), text.end(), text.begin(), lower);
        return text;
    };
    const bool found = wait_for([&] { return contains(lower_case(gained()), part); }, 2s);
    CHECK_MESSAGE(found, "'" << part << "' in: " << gained());
    if (part.empty()) { CHECK_MESSAGE(gained() == "", gained()); }
    return reply;
}

TEST_CASE("the head of a response: version, Connection, Date, Server, framing") {
    const Server server(kScripted, {"-w", "1"});
    const string plain = "start('200 OK', [('X-A', 'b')]); out = [b'abc', b'de']";
    const string with_length = "start('200 OK', [('Content-Length', '5')]); out = [b'abcde']";
    const Reply reply = answer(server, plain);
    CHECK(reply.version == "HTTP/1.1");
    CHECK(reply.head.compare(0, 17, "HTTP/1.1 200 OK\r\n") == 0);
    CHECK(field(reply, "transfer-encoding") == "chunked");
    CHECK(reply.body == "abcde");
    CHECK(reply.whole);
    CHECK(field(reply, "x-a") == "b");
    for (const char* name : {"\nDate: ", "\nServer: ", "\nConnection: close\r"}) {
        CHECK(count(reply.head, name) == 1);
    }
    struct tm parts = {};
    const string date = field(reply, "date");
    const char* end = ::strptime(date.c_str(), "%a, %d %b %Y %H:%M:%S GMT", &parts);
    REQUIRE(end != nullptr);
    CHECK(*end == '\0');
    CHECK(std::abs(std::difftime(::timegm(&parts), std::time(nullptr))) < 5);

    const Reply old = answer(server, plain, "", "POST / HTTP/1.0");
    CHECK(old.version == "HTTP/1.0");
    CHECK(field(old, "transfer-encoding") == "");
    CHECK(field(old, "connection") == "close");
    CHECK(old.body == "abcde");
    CHECK(answer(server, plain, "", "POST / HTTP/1.3").version == "HTTP/1.1");
    CHECK(request(server.port(), "GET / HTTP/2.0\r\n\r\n").version == "HTTP/1.0");
    CHECK(request(server.port(), http("GET /", "A\r\n")).version == "HTTP/1.1");

    const Reply length = answer(server, with_length);
    CHECK(field(length, "content-length") == "5");
    CHECK(field(length, "transfer-encoding") == "");
    CHECK(length.raw.substr(length.raw.size() - 9) == "\r\n\r\nabcde");

    const Reply own =
        answer(server, "start('200 Fine', [('date', 'today'), ('SERVER', 'mine')]); out = [b'x']");
    CHECK(field(own, "date") == "today");
    CHECK(field(own, "server") == "mine");
    CHECK(count(own.head, "erver: ") + count(own.head, "SERVER: ") == 1);
    CHECK(count(own.head, "Date: ") == 0);
    const Reply twice = answer(server,
                               "start('200 OK', [('Date', 'a'), ('Date', 'b'), "
                               "('Server', 'c'), ('Server', 'd')])");
    CHECK(count(twice.head, "Date: ") == 1);
    CHECK(count(twice.head, "Server: ") == 1);

    const Reply big = answer(server,
                             "start('200 OK', [('X-%d' % i, 'y' * 9000) "
                             "for i in range(100)]); out = [b'abc']");
    CHECK(big.status == 200);
    CHECK(big.head.size() > 900'000);
    CHECK(big.body == "abc");
    const Reply cookies = answer(server,
                                 "start('200 OK', [('Set-Cookie', 'a'), "
                                 "('Set-Cookie', 'b'), ('X', '\\t \\xe9')])");
    CHECK(count(cookies.head, "Set-Cookie: ") == 2);
    CHECK(contains(cookies.head, "\xe9\r\n"));
}

TEST_CASE("HEAD, 204 and 304 have no body, error pages too") {
    const Server server(kScripted, {"-w", "1"});
    const string length = "('Content-Length', '5')", head = "HEAD / HTTP/1.1";
    const auto script = [](const string& status, const string& fields) {
        return "start('" + status + "', [" + fields + "]); out = [b'abcde']";
    };
    const Reply kept = answer(server, script("200 OK", length), "", head);
    CHECK(kept.status == 200);
    CHECK(field(kept, "content-length") == "5");
    CHECK(kept.raw.size() == kept.head.size() + 2);
    for (const string& each :
         {script("200 OK", ""), script("204 No Content", ""), script("304 Not Modified", ""),
          script("304 Not Modified", length), script("204 No Content", length)}) {
        CAPTURE(each);
        const Reply reply =
            answer(server, each, "", contains(each, "200") ? head : "GET / HTTP/1.1");
        CHECK(reply.status == std::atoi(each.c_str() + 7));
        CHECK(reply.raw.size() == reply.head.size() + 2);
        if (reply.status != 200) { CHECK(field(reply, "transfer-encoding") == ""); }
    }
    const string fails = "raise KeyError('ouch')", logged = "keyerror: 'ouch'";
    check_error_page(answer(server, fails, logged, head), 500, false);
    check_error_page(answer(server, fails, logged), 500);
}

TEST_CASE("hop-by-hop fields of the app are dropped, and the log says so") {
    const Server server(kScripted, {"-w", "1"});
    for (const string name : {"Connection", "Keep-Alive", "Proxy-Authenticate", "TE", "Trailer",
                              "Proxy-Authorization", "Transfer-Encoding", "Upgrade"}) {
        CAPTURE(name);
        string lower_name(name);
        std::transform(lower_name.begin(), lower_name.end(), lower_name.begin(), lower);
        const Reply reply = answer(
            server, "start('200 OK', [('" + name + "', 'evil'), ('X', 'y')]); out = [b'abc']",
            lower_name);
        CHECK(reply.status == 200);
        CHECK_FALSE(contains(reply.raw, "evil"));
        CHECK(field(reply, "x") == "y");
        CHECK(reply.body == "abc");
        CHECK(reply.whole);
        CHECK(count(reply.head, "Connection: ") == 1);
    }
}

TEST_CASE("what is no response is a 500, and the log says which") {
    struct Row {
        string title, script, log;
    };
    const Row rows[] = {
        {"a status without a reason", "start('200', [])", "status"},
        {"a status without a blank", "start('200OK', [])", "status"},
        {"a status of letters", "start('abc OK', [])", "status"},
        {"a status of two digits", "start('99 OK', [])", "status"},
        {"a status of four digits", "start('2000 OK', [])", "status"},
        {"an empty status", "start('', [])", "status"},
        {"a status with a line break", "start('200 OK\\r\\nX: y', [])", "status"},
        {"a status with a control", "start('200 O\\x01K', [])", "status"},
        {"a status of bytes", "start(b'200 OK', [])", "status"},
        {"a status that is a number", "start(200, [])", "status"},
        {"a status beyond latin-1", "start('200 \\u20ac', [])", "latin-1"},
        {"a blank in a name", "start('200 OK', [('X Y', 'z')])", "header"},
        {"an empty name", "start('200 OK', [('', 'z')])", "header"},
        {"a colon in a name", "start('200 OK', [('X:Y', 'z')])", "header"},
        {"a name that is not ASCII", "start('200 OK', [('X\\xe9', 'z')])", "header"},
        {"a name of bytes", "start('200 OK', [(b'X', 'z')])", "header"},
        {"a line break in a name", "start('200 OK', [('X\\nY', 'z')])", "header"},
        {"a value of bytes", "start('200 OK', [('X', b'z')])", "header"},
        {"a value that is a number", "start('200 OK', [('X', 5)])", "header"},
        {"a value that is None", "start('200 OK', [('X', None)])", "header"},
        {"LF in a value", "start('200 OK', [('X', 'a\\nY: b')])", "header"},
        {"CR in a value", "start('200 OK', [('X', 'a\\rY: b')])", "header"},
        {"NUL in a value", "start('200 OK', [('X', 'a\\0')])", "header"},
        {"ESC in a value", "start('200 OK', [('X', 'a\\x1b')])", "header"},
        {"DEL in a value", "start('200 OK', [('X', 'a\\x7f')])", "header"},
        {"a value beyond latin-1", "start('200 OK', [('X', '\\u20ac')])", "latin-1"},
        {"a length that is no number", "start('200 OK', [('Content-Length', 'x')])", "length"},
        {"a length with a sign", "start('200 OK', [('Content-Length', '+1')])", "length"},
        {"a negative length", "start('200 OK', [('Content-Length', '-1')])", "length"},
        {"an empty length", "start('200 OK', [('Content-Length', '')])", "length"},
        {"a list of lengths", "start('200 OK', [('Content-Length', '1, 1')])", "length"},
        {"two lengths", "start('200 OK', [('Content-Length', '1'), ('content-length', '1')])",
         "length"},
        {"an item of str", "start('200 OK', []); out = ['x']", "bytes"},
        {"an item of str behind one of bytes", "start('200 OK', []); out = [b'x', 'y']", "bytes"},
        {"an empty item of str", "start('200 OK', []); out = ['']", "bytes"},
        {"an item that is a bytearray", "start('200 OK', []); out = [bytearray(b'x')]", "bytes"},
        {"an item that is None", "start('200 OK', []); out = iter([None])", "bytes"},
        {"an item that is a number", "start('200 OK', []); out = iter([5])", "bytes"},
        {"write() of str", "start('200 OK', [])('x')", "bytes"},
        {"no start_response", "out = [b'x']", "start_response"},
        {"no start_response, and a generator", "out = iter([b'x'])", "start_response"},
        {"no start_response, and nothing", "out = iter([])", "start_response"},
        {"start_response twice", "start('200 OK', []); start('200 OK', [])", "start_response"},
        {"None for a response", "start('200 OK', []); out = None", "nonetype"},
        {"an error", "1 / 0", "zerodivisionerror"},
    };
    const Server server(kScripted, {"-w", "1"});
    REQUIRE(server.wait_ready_workers(1));
    const vector<pid_t> runners = server.runners();
    for (const Row& row : rows) {
        CAPTURE(row.title);
        check_error_page(answer(server, row.script, row.log), 500);
    }
    CHECK(server.runners() == runners);
    CHECK(answer(server, "start('200 OK', [])").status == 200);
}

TEST_CASE("headers go out with the first non-empty item, and can be replaced until then") {
    const Server server(kScripted, {"-w", "1"});
    const string again = "start('503 Later', [('X', 'new')], sys.exc_info())";
    const auto replaced = [&](const string& first) {
        return "def gen():\n"
               "    start('200 OK', [('Content-Length', '99')])\n" +
               first +
               "    try:\n        raise KeyError('ouch')\n"
               "    except KeyError:\n        " +
               again +
               "\n"
               "    yield b'sorry'\n"
               "out = gen()\n";
    };
    const string empty_item = "    yield b''\n", full_item = "    yield b'x'\n";
    const Reply reply = answer(server, replaced(empty_item));
    CHECK(reply.status == 503);
    CHECK(field(reply, "x") == "new");
    CHECK(field(reply, "content-length") == "");
    CHECK(reply.body == "sorry");
    CHECK(reply.whole);

    const string fails =
        "def gen():\n    start('200 OK', [])\n    yield b''\n    1 / 0\n"
        "out = gen()";
    check_error_page(answer(server, fails, "zerodivisionerror"), 500);
    for (const string nothing : {"start('200 OK', [])\n", "start('200 OK', [])(b'')\n"}) {
        const string error = nothing + "try:\n    1 / 0\nexcept Exception:\n    " + again;
        CHECK(answer(server, error).status == 503);
    }

    const Reply late = answer(server, replaced(full_item), "keyerror: 'ouch'");
    CHECK(late.status == 200);
    CHECK(late.body == "x");
    CHECK_FALSE(late.whole);
    const Reply written = answer(server,
                                 "write = start('200 OK', [])\nwrite(b'a')\nwrite(b'b')\n"
                                 "out = [b'c']");
    CHECK(written.body == "abc");
    CHECK(written.whole);
    CHECK(answer(server, "start('200 OK', [])(b'all'); out = []").body == "all");
    const Reply nothing = answer(server, "start('200 OK', []); out = iter([])");
    CHECK(nothing.status == 200);
    CHECK(nothing.whole);
    CHECK_FALSE(contains(server.log(), "broke the protocol"));
}

TEST_CASE("a response that is too short or breaks off is visibly cut, one too long is cut to it") {
    const Server server(kScripted, {"-w", "1"});
    const string gen =
        "def gen():\n    start('200 OK', [FIELDS])\n    yield b'abc'\nTHEN"
        "out = gen()\n";
    const auto script = [&](const string& fields, const string& then) {
        string text = gen;
        text.replace(text.find("FIELDS"), 6, fields);
        return text.replace(text.find("THEN"), 4, then);
    };
    const string length = "('Content-Length', '5')", error = "    1 / 0\n";
    for (const string line : {"GET / HTTP/1.1", "GET / HTTP/1.0"}) {
        CAPTURE(line);
        const bool old = contains(line, "1.0");
        const Reply cut_off = answer(server, script(length, ""), "shorter", line);
        CHECK(cut_off.status == 200);
        CHECK(cut_off.body == "abc");
        CHECK_FALSE(cut_off.whole);
        const Reply failed = answer(server, script(length, error), "zerodivisionerror", line);
        CHECK(failed.body == "abc");
        CHECK_FALSE(failed.whole);
        const Reply longer = answer(server, script(length, "    yield b'defg'\n"), "longer", line);
        CHECK(longer.body == "abcde");
        CHECK(longer.whole);
        const Reply list =
            answer(server, "start('200 OK', [" + length + "]); out = [b'abcdefg']", "longer", line);
        CHECK(list.body == "abcde");

        Client client(server);
        client.send(scripted(script("", error), line));
        const Reply chunked(client.read_all());
        CHECK(chunked.status == (chunked.raw.empty() ? 0 : 200));
        CHECK((old ? client.was_reset : !chunked.whole));
        CHECK((old || chunked.body == "abc"));
    }
    CHECK(answer(server, script(length, ""), "shorter").raw.size() > 0);
    CHECK(count(server.log(), "ZeroDivisionError") == 4);
    CHECK(count(server.access(), "\" 200 3 ") >= 5);
}

TEST_CASE("the response ends before close() runs, and an error there is only logged") {
    const Server server(kScripted, {"-w", "1"});
    const string closing = R"(
class Items:
    def __init__(self, items): self.items = items
    def __iter__(self): return iter(self.items)
    def close(self):
        print("close begins", flush=True)
        for _ in range(1000):
            if os.path.exists("go"): break
            time.sleep(0.01)
        os.path.exists("go") and os.unlink("go")
        raise ValueError("from close")
class Listed(Items, list): pass
start("200 OK", [])
out = )";
    for (const string items : {"Items([b'abc', b'de'])", "Items([])", "Listed([])"}) {
        CAPTURE(items);
        const size_t before = server.log().size();
        const Reply reply = request(server.port(), scripted(closing + items));
        CHECK(reply.status == 200);
        CHECK(reply.whole);
        CHECK(reply.body == (contains(items, "abc") ? "abcde" : ""));
        CHECK_FALSE(contains(server.log().substr(before), "from close"));
        write_file(server.dir.path + "/go", "");
        CHECK(wait_for([&] { return contains(server.log().substr(before), "from close"); }));
        CHECK(contains(server.log().substr(before), "close begins"));
    }
    CHECK(answer(server, "start('200 OK', [])").status == 200);
    CHECK(count(server.log(), "Error handling request") == 0);
}

TEST_CASE("strings and lists of classes of their own are what they look like") {
    const Server server(kScripted, {"-w", "1"});
    const Reply reply = answer(server, R"(
class Markup(str):  # as in markupsafe: what it is added to is escaped
    def __add__(self, other): return Markup(str.__add__(self, other.replace("<", "&lt;")))
    def __radd__(self, other): return Markup(other.replace("<", "&lt;") + str(self))
class Lazy(list):
    def __iter__(self): return made
made = iter([b"made ", b"late"])
start(Markup("200 OK"), [("Link", "</a>"), (Markup("X-User"), Markup("<b>")), ("X-Last", "</c>")])
out = Lazy())");
    CHECK(reply.status == 200);
    CHECK(field(reply, "link") == "</a>");
    CHECK(field(reply, "x-user") == "<b>");
    CHECK(field(reply, "x-last") == "</c>");
    CHECK(reply.body == "made late");
}

TEST_CASE("close() may read the body, whatever its size; the client has its response by then") {
    const Server server(kScripted, {"-w", "1"});
    const string closing = R"(
class Reads(list):
    def close(self):
        for _ in range(1000):
            if os.path.exists("go"): break
            time.sleep(0.01)
        print("close() read", len(environ["wsgi.input"].read()))
        write(b"too late")
write = start("200 OK", [])
out = Reads([b"abc"]))";
    for (const size_t size : {size_t{10}, size_t{70000}, size_t{3000000}}) {
        CAPTURE(size);
        ::unlink((server.dir.path + "/go").c_str());
        const Reply reply =
            request(server.port(), scripted(closing, "POST / HTTP/1.1", string(size, 'x')));
        CHECK(reply.status == 200);
        CHECK(reply.whole);
        CHECK(reply.body == "abc");
        write_file(server.dir.path + "/go", "");
        CHECK(server.log_has("close() read " + to_string(size) + "\n"));
        CHECK(answer(server, "start('200 OK', []); out = [b'next']").body == "next");
    }
}

TEST_CASE("lines that applications of several workers print are not torn") {
    const Server server(R"py(
import sys

def app(environ, start_response):
    for i in range(100):
        print("line", i, "of", environ["QUERY_STRING"], "ends", file=(sys.stdout, sys.stderr)[i % 2])
    sys.stdout.write("no end")
    sys.stdout.flush()
    start_response("200 OK", [])
    return [b"done"]
)py",
                        {"-w", "3"});
    vector<Client> clients;
    for (int i = 0; i < 60; ++i) {
        clients.emplace_back(server).send(http("GET /?" + to_string(i)));
    }
    for (Client& client : clients) { CHECK(Reply(client.read_all()).body == "done"); }
    string log = server.log();
    for (size_t at; (at = log.find("no end")) != string::npos;) { log.erase(at, 6); }
    size_t whole = 0;
    std::istringstream lines(log);
    for (string line; std::getline(lines, line);) {
        const bool starts = line.find("line ") == 0, ends = line.find(" ends") == line.size() - 5;
        whole += starts && ends ? 1 : 0;
    }
    CHECK(whole == 6000);
}

TEST_CASE("an application without a descriptor left has its error in the log all the same") {
    const Server server(kScripted, {"-w", "1"});
    const Reply reply = answer(server, R"(
taken = []
while True: taken.append(os.open("/dev/null", os.O_RDONLY)))",
                               "too many open files");
    CHECK(reply.status == 500);
}

TEST_CASE("file_wrapper delivers what read() would, from where the file stands") {
    const Server server(kScripted, {"-w", "1"});
    string text;
    for (int i = 0; text.size() < 300'000; ++i) { text += to_string(i) + " "; }
    write_file(server.dir.path + "/data", text);
    struct Row {
        string title, script, body;
    };
    const Row rows[] = {
        {"a file", "f = open('data', 'rb')", text},
        {"a file from the middle", "f = open('data', 'rb'); f.seek(1000)", text.substr(1000)},
        {"a file of which something was read", "f = open('data', 'rb'); f.read(3)", text.substr(3)},
        {"a file at its end", "f = open('data', 'rb'); f.read()", ""},
        {"no real file", "f = io.BytesIO(b'abcdef'); f.seek(2)", "cdef"},
        {"a file with a read() of its own",
         "class F:\n    left = [b'one ', b'two']\n"
         "    def read(self, size=-1): return self.left.pop(0) if self.left else b''\nf = F()",
         "one two"},
        {"an end that is no bytes, as wsgiref takes it", "f = io.StringIO()", ""},
        {"a subclass that reads something else",
         "class F(io.FileIO):\n    def read(self, size=-1): return super().read(size)[:5].upper()\n"
         "f = F('data'); f.seek(len(open('data').read()) - 3)",
         text.substr(text.size() - 3)},
    };
    for (const Row& row : rows) {
        CAPTURE(row.title);
        const string script = row.script +
                              "\nstart('200 OK', [])\n"
                              "kept['f'] = f\n"
                              "out = environ['wsgi.file_wrapper'](f, 1000)\n";
        const Reply reply = answer(server, script);
        CHECK(reply.status == 200);
        CHECK((reply.body == row.body));
        CHECK(reply.whole);
        const Reply closed = answer(
            server, "start('200 OK', []); out = [b'%d' % getattr(kept['f'], 'closed', True)]");
        CHECK(closed.body == "1");
    }
    const Reply made = answer(server,
                              "wrapper = environ['wsgi.file_wrapper']\n"
                              "made = wrapper(filelike=io.BytesIO(b'x'), blksize=1)\n"
                              "start('200 OK', []); out = [b'%d' % isinstance(made, wrapper)]");
    CHECK(made.body == "1");  // some ask: with gunicorn it is a class
}

TEST_CASE("what a request was given is inert once it is over") {
    const Server server(kScripted, {"-w", "1"});
    const string keep =
        "kept['in'] = environ['wsgi.input']\nkept['start'] = start\n"
        "kept['write'] = start('200 OK', [])\nout = [b'first']";
    const string use =
        "kept['write'](b'evil')\n"
        "kept['start']('500 Evil', [], (None, ValueError('x'), None))\n"
        "old = kept['in'].read(10)\n"
        "new = environ['wsgi.input'].read()\n"
        "start('200 OK', [])\nout = [b'%d ' % len(new), new[:5]]";
    const auto guarded = [](const string& text) {  // a refusal is as good as no effect
        string out;
        std::istringstream lines(text);
        for (string line; std::getline(lines, line);) {
            out += contains(line, "kept[") ? "try: " + line + "\nexcept Exception: pass\n"
                                           : line + "\n";
        }
        return out;
    };
    for (const size_t size : {size_t{0}, size_t{100}, size_t{500'000}}) {
        CAPTURE(size);
        const string line = "POST / HTTP/1.1";
        const Reply first = request(server.port(), scripted(keep, line, string(size, 'a')));
        CHECK(first.body == "first");
        const Reply next = request(server.port(), scripted(guarded(use), line, string(size, 'b')));
        CHECK(next.status == 200);
        CHECK(next.body == to_string(size) + " " + string(std::min<size_t>(size, 5), 'b'));
        CHECK(next.whole);
    }
    CHECK(server.runners().size() == 1);
    CHECK_FALSE(contains(server.log(), "Runner (pid"));
}

// --- logs -------------------------------------------------------------------

vector<string> split(const string& text, char separator) {
    vector<string> parts;
    string_view rest = text;
    while (!rest.empty()) { parts.emplace_back(cut(rest, separator)); }
    return parts;
}

/// Answers after 30 ms with 5 bytes and a field, or with nothing to /none.
constexpr const char* kAtoms = R"py(
import time
def app(environ, start_response):
    time.sleep(0.03)
    start_response("201 Created", [("X-Out", 'a"b'), ("Content-Type", "text/x")])
    return [] if environ["PATH_INFO"] == "/none" else [b"abc", b"de"]
)py";

TEST_CASE("every atom of the access log") {
    const string names =
        "h l u t r m U q H s B b f a T M D L p {X-In}i {x-in}i {absent}i "
        "{content-length}i {X-Out}o {content-type}o {absent}o {REMOTE_PORT}e "
        "{PATH_INFO}e {absent}e Z";
    string format = "[begin]";
    for (const string& name : split(names, ' ')) { format += "\t%(" + name + ")s"; }
    const Server server(kAtoms, {"-w", "1", "--access-logformat", format + "\t100%"});
    const auto atoms = [&](const string& bytes) {
        const size_t before = server.access().size();
        Client client(server);
        client.send(bytes);
        client.read_all();
        CHECK(wait_for([&] { return server.access().size() > before; }));
        const string line = server.access().substr(before);
        CHECK(count(line, "\n") == 1);
        const vector<string> values = split(line.substr(0, line.size() - 1), '\t');
        const vector<string> keys = split(names, ' ');
        REQUIRE(values.size() == keys.size() + 2);
        CHECK(values.front() == "[begin]");
        CHECK(values.back() == "100%");
        map<string, string> found;
        for (size_t i = 0; i < keys.size(); ++i) { found[keys[i]] = values[i + 1]; }
        CHECK(found["{REMOTE_PORT}e"] == local_port(client));
        return found;
    };
    const auto a = atoms(http("POST /a%20b/%41?c=%20d#e",
                              "X-In: in\r\nReferer: http://r/\r\nUser-Agent: me/1\r\n"
                              "Authorization: Basic am9lOnNlY3JldA==\r\nContent-Length: 3\r\n",
                              "xyz"));
    const map<string, string> expected = {{"h", "127.0.0.1"},
                                          {"l", "-"},
                                          {"u", "joe"},
                                          {"r", "POST /a%20b/%41?c=%20d#e HTTP/1.1"},
                                          {"m", "POST"},
                                          {"U", "/a b/A"},
                                          {"q", "c=%20d"},
                                          {"H", "HTTP/1.1"},
                                          {"s", "201"},
                                          {"B", "5"},
                                          {"b", "5"},
                                          {"f", "http://r/"},
                                          {"a", "me/1"},
                                          {"T", "0"},
                                          {"{X-In}i", "in"},
                                          {"{x-in}i", "in"},
                                          {"{absent}i", "-"},
                                          {"{content-length}i", "3"},
                                          {"{X-Out}o", "a\\\"b"},
                                          {"{content-type}o", "text/x"},
                                          {"{absent}o", "-"},
                                          {"{PATH_INFO}e", "/a b/A"},
                                          {"{absent}e", "-"},
                                          {"Z", "-"}};
    for (const auto& each : expected) {
        CAPTURE(each.first);
        CHECK(a.at(each.first) == each.second);
    }
    const int64_t us = std::atoll(a.at("D").c_str()), ms = std::atoll(a.at("M").c_str());
    CHECK(us >= 30'000);
    CHECK(us < 900'000);
    CHECK(ms == us / 1000);
    char decimal[32];
    std::snprintf(decimal, sizeof decimal, "%.6f", static_cast<double>(us) / 1e6);
    CHECK(a.at("L") == decimal);
    REQUIRE(server.workers().size() == 1);
    CHECK(a.at("p") == "<" + to_string(server.worker()) + ">");
    struct tm parts = {};
    const char* end = ::strptime(a.at("t").c_str(), "[%d/%b/%Y:%H:%M:%S %z]", &parts);
    REQUIRE(end != nullptr);
    CHECK(*end == '\0');
    parts.tm_isdst = -1;
    CHECK(std::abs(std::difftime(std::mktime(&parts), std::time(nullptr))) < 5);

    const auto b = atoms(http("GET /none", "Authorization: Bearer x\r\n"));
    const map<string, string> plain = {
        {"u", "-"}, {"q", ""},  {"B", "0"},       {"b", "-"},
        {"f", "-"}, {"a", "-"}, {"{X-In}i", "-"}, {"{content-length}i", "-"}};
    for (const auto& each : plain) {
        CAPTURE(each.first);
        CHECK(b.at(each.first) == each.second);
    }
    const auto c = atoms("GET /none HTTP/1.0\r\nContent-Length: 0\r\n\r\n");
    CHECK(c.at("H") == "HTTP/1.0");
    CHECK(c.at("r") == "GET /none HTTP/1.0");
    CHECK(c.at("{content-length}i") == "0");
    CHECK(atoms(http("HEAD /")).at("B") == "0");
    CHECK(atoms(chunks("1\r\na\r\n0\r\n\r\n")).at("B") == "5");
}

TEST_CASE("the access log has gunicorn's format, also for refusals, and is off by default") {
    const Server server(kHello, {"-w", "1"});
    CHECK(get(server, "/a?b").status == 200);
    CHECK(request(server.port(), "GET /a b c HTTP/1.1\r\n\r\n").status == 400);
    REQUIRE(wait_for([&] { return count(server.access(), "\n") == 2; }));
    const vector<string> lines = split(server.access(), '\n');
    CHECK(lines[0].substr(0, 15) == "127.0.0.1 - - [");
    CHECK(lines[0].substr(lines[0].find("] ")) == "] \"GET /a?b HTTP/1.1\" 200 6 \"-\" \"-\"");
    CHECK(lines[1].substr(lines[1].find("] ")) == "] \"GET /a b c HTTP/1.1\" 400 16 \"-\" \"-\"");

    // A variable of that name keeps the test's own setting away.
    const Server quiet(kHello, {"-w", "1", "-e", "--access-logfile=none"});
    CHECK(get(quiet).status == 200);
    CHECK(get(quiet).status == 200);
    CHECK(quiet.out() == "");
    CHECK(quiet.access() == "");
    CHECK_FALSE(contains(quiet.log(), "GET /"));

    const Server timed(kHello, {"-w", "1", "--access-logformat", "%(s)s %(T)s"});
    CHECK(request(timed.port(), "GET\r\n\r\n").status == 400);
    CHECK(wait_for([&] { return timed.access() == "400 0\n"; }));  // from the connection on

    const Server to_stdout(kHello,
                           {"-w", "1", "--access-logfile", "-", "--access-logformat=%(s)s!"});
    CHECK(get(to_stdout).status == 200);
    CHECK(wait_for([&] { return to_stdout.out() == "200!\n"; }));
}

TEST_CASE("nothing that a client sends gets into a log unescaped") {
    const string format = "%(r)s|%(U)s|%(q)s|%(f)s|%(a)s|%(u)s|%({X-In}i)s|%({PATH_INFO}e)s|%(m)s";
    const Server server(kScripted, {"-w", "1", "--access-logformat", format});
    const string fails = "1 / 0";
    const string evil_fields =
        "Referer: r\"\\\r\nUser-Agent: u\"\\\tx\r\nX-In: i\"\\\r\n"
        "Authorization: Basic ZRsiXFx/Cg1mOnA=\r\n";
    request(server.port(), "POST /%0a%0d%1b%22%5c%7f%01\"\\?q\"\\ HTTP/1.1\r\n" + evil_fields +
                               "X-Script: 5\r\nContent-Length: 5\r\n\r\n" + fails);
    const string raw_path = "/%0a%0d%1b%22%5c%7f%01\\\"\\\\";
    const string path = "/\\x0a\\x0d\\x1b\\\"\\\\\\x7f\\x01\\\"\\\\";
    REQUIRE(server.access_has("\n"));
    CHECK(server.access() ==
          "POST " + raw_path + "?q\\\"\\\\ HTTP/1.1|" + path + "|q\\\"\\\\|r\\\"\\\\|" +
              "u\\\"\\\\\\x09x|e\\x1b\\\"\\\\\\\\\\x7f\\x0a\\x0df|i\\\"\\\\|" + path + "|POST\n");
    CHECK(server.log_has("Error handling request: POST " + raw_path + "?q\\\"\\\\ HTTP/1.1\n"));

    const size_t errors = server.log().size();
    const vector<string> heads = {"GET /\x1b[31m\"\\\x7f\x9b HTTP/1.1\r\n\r\n",
                                  "\x1b]0;\"\\\x07\r\n\r\n", "G\"\\\x01 / HTTP/1.1\r\n\r\n",
                                  "GET /a\rb HTTP/1.1\r\n\r\n"};
    for (const string& head : heads) { CHECK(request(server.port(), head).status == 400); }
    REQUIRE(wait_for([&] { return count(server.access(), "\n") == heads.size() + 1; }));
    const string gained = server.log().substr(errors);
    CHECK(count(gained, "\n") == heads.size());
    CHECK(contains(gained, "GET /\\x1b[31m\\\"\\\\\\x7f"));
    for (const string& text : {gained, server.access()}) {
        CAPTURE(text);
        CHECK(std::all_of(text.begin(), text.end(), [](char c) {
            const auto byte = static_cast<unsigned char>(c);
            return byte == '\n' || (byte >= 0x20 && byte < 0x7f) || byte >= 0xa0;
        }));
    }
    // One of the app's fields, too: a tab is the only control that it can send.
    const Server out(kScripted, {"-w", "1", "--access-logformat", "%({X}o)s"});
    request(out.port(), scripted("start('200 OK', [('X', 'a\\t\"\\\\')])"));
    CHECK(out.access_has("\n"));
    CHECK(out.access() == "a\\x09\\\"\\\\\n");
}

TEST_CASE("a hung app and a frozen worker: WORKER TIMEOUT with the pid, and the request") {
    const Server server(R"py(
import time
def app(environ, start_response):
    time.sleep(60)
)py",
                        {"-w", "1", "-t", "1"});
    REQUIRE(server.wait_ready_workers(1));
    REQUIRE(server.runners().size() == 1);
    const pid_t runner = server.runner(), worker = server.worker();
    check_error_page(get(server, "/hung\"?x"), 504);
    const string text = server.log();
    const size_t at = text.find("WORKER TIMEOUT (pid:" + to_string(runner) + ")");
    REQUIRE_MESSAGE(at != string::npos, text);
    const string line = text.substr(at, text.find('\n', at) - at);
    CHECK_MESSAGE(contains(line, "GET /hung\\\"?x HTTP/1.1"), line);
    CHECK_MESSAGE(contains(line, " 1 s"), line);
    CHECK(server.access_has("GET /hung\\\"?x HTTP/1.1\" 504 "));
    ::kill(worker, SIGSTOP);
    CHECK(server.log_has("WORKER TIMEOUT (pid:" + to_string(worker) + ")"));
    CHECK(wait_for([&] {
        const vector<pid_t> workers = server.workers();
        return workers.size() == 1 && workers[0] != worker;
    }));
}

TEST_SUITE_END();

// --- command line and process -----------------------------------------------
TEST_SUITE_BEGIN("processes");

struct Ran {
    int code = -1;  // exit status; -1: a signal ended it, or it did not end
    string out, err;
};

/// Runs $SERVER with exactly these arguments, in a directory of its own, until it ends.
Ran run_to_end(vector<string> args, vector<string> env = {}, const string& app = kHello) {
    const TempDir dir;
    write_file(dir.path + "/app.py", app);
    string path = server_path();
    const pid_t pid = ::fork();
    if (pid == 0) {
        ::setpgid(0, 0);
        for (string& pair : env) { ::putenv(pair.data()); }
        const int out = ::open((dir.path + "/out").c_str(), O_WRONLY | O_CREAT | O_APPEND, 0644);
        const int err = ::open((dir.path + "/err").c_str(), O_WRONLY | O_CREAT | O_APPEND, 0644);
        ::dup2(out, 1);
        ::dup2(err, 2);
        vector<char*> argv{path.data()};
        for (string& word : args) { argv.push_back(word.data()); }
        argv.push_back(nullptr);
        if (::chdir(dir.path.c_str()) == 0) { ::execv(path.c_str(), argv.data()); }
        ::_exit(127);
    }
    REQUIRE(pid > 0);
    int status = 0;
    const bool ended = wait_for([&] { return ::waitpid(pid, &status, WNOHANG) == pid; }, 15s);
    if (!ended) {
        ::kill(pid, SIGQUIT);
        if (!wait_for([&] { return ::waitpid(pid, &status, WNOHANG) == pid; }, 3s)) {
            ::kill(pid, SIGKILL);
            ::waitpid(pid, &status, 0);
        }
    }
    return {ended && WIFEXITED(status) ? WEXITSTATUS(status) : -1, read_file(dir.path + "/out"),
            read_file(dir.path + "/err")};
}

/// Whether this is root who may become another user (one in a user namespace may not), and may look
/// at that one's processes then (in many a container it may not: it takes CAP_SYS_PTRACE).
std::pair<bool, bool> may_become_and_see_others() {
    int ends[2];
    REQUIRE(::pipe2(ends, O_CLOEXEC) == 0);
    const Fd from(ends[0]);
    Fd to(ends[1]);
    const pid_t pid = ::fork();
    if (pid == 0) {
        if (::geteuid() != 0 || ::setgroups(0, nullptr) < 0 || ::setgid(65534) < 0 ||
            ::setuid(65534) < 0 || ::write(to.get(), "x", 1) != 1) {
            ::_exit(1);
        }
        for (;;) { ::pause(); }
    }
    REQUIRE(pid > 0);
    to.reset();
    char byte;
    const bool become = ::read(from.get(), &byte, 1) == 1;
    const string end = "/proc/" + to_string(pid) + "/fd/" + to_string(ends[1]);
    const bool see = become && ::access(end.c_str(), F_OK) == 0;
    ::kill(pid, SIGKILL);
    ::waitpid(pid, nullptr, 0);
    return {become, see};
}

/// The value of a setting in the output of --print-config.
string setting(const string& out, const string& name) {
    for (const string& line : split(out, '\n')) {
        const size_t equals = line.find('=');
        if (equals != string::npos && trim(string_view(line).substr(0, equals)) == name) {
            return string(trim(string_view(line).substr(equals + 1)));
        }
    }
    return "(none)";
}

TEST_CASE("the command line, as --print-config shows it") {
    struct Row {
        vector<string> args, env;
        vector<std::pair<string, string> > settings;
    };
    const string processors = to_string(std::max(1L, ::sysconf(_SC_NPROCESSORS_ONLN)));
    const vector<Row> rows = {
        {{},
         {},
         {{"app", "app_example:app"},
          {"bind", "127.0.0.1:8000"},
          {"workers", "2"},
          {"timeout", "30"},
          {"graceful-timeout", "30"},
          {"backlog", "2048"},
          {"worker-connections", "1000"},
          {"limit-request-line", "4094"},
          {"limit-request-fields", "100"},
          {"limit-request-field_size", "8190"},
          {"limit-request-body", "1073741824"},
          {"header-timeout", "10"},
          {"worker-class", "sync"},
          {"access-logfile", ""},
          {"error-logfile", "-"},
          {"log-level", "info"},
          {"python", "python3"},
          {"daemon", "no"},
          {"reload", "no"},
          {"proxy-protocol", "no"},
          {"help", "(none)"},
          {"chdir", ""}}},
        {{"-D", "--reload", "--proxy-protocol"},
         {},
         {{"daemon", "yes"}, {"reload", "yes"}, {"proxy-protocol", "yes"}}},
        {{"mod:app"}, {}, {{"app", "mod:app"}}},
        {{"-w", "4"}, {}, {{"workers", "4"}}},
        {{"-w4"}, {}, {{"workers", "4"}}},
        {{"--workers", "4"}, {}, {{"workers", "4"}}},
        {{"--workers=4"}, {}, {{"workers", "4"}}},
        {{"-w", "4", "-w", "5"}, {}, {{"workers", "5"}}},
        {{"-w", "auto"}, {}, {{"workers", processors}}},
        {{}, {"WEB_CONCURRENCY=7"}, {{"workers", "7"}}},
        {{"-w", "4"}, {"WEB_CONCURRENCY=7"}, {{"workers", "4"}}},
        {{}, {"FORWARDED_ALLOW_IPS=10.0.0.1"}, {{"forwarded-allow-ips", "10.0.0.1"}}},
        {{"--forwarded-allow-ips", "*"},
         {"FORWARDED_ALLOW_IPS=::1"},
         {{"forwarded-allow-ips", "*"}}},
        {{"--limit-request-fields", "0"}, {}, {{"limit-request-fields", "32768"}}},
        {{}, {"PORT=9000"}, {{"bind", "0.0.0.0:9000"}}},
        {{"-b", ":1"}, {"PORT=9000"}, {{"bind", ":1"}}},
        {{"-b:1", "--bind", "[::1]:2", "--bind=unix:/a=b"}, {}, {{"bind", ":1,[::1]:2,unix:/a=b"}}},
        {{"mod:app", "-w", "4", "--timeout=9"},
         {},
         {{"app", "mod:app"}, {"workers", "4"}, {"timeout", "9"}}},
        {{"-t9", "--", "mod:app"}, {}, {{"app", "mod:app"}, {"timeout", "9"}}},
        {{"-t", "0", "--graceful-timeout", "0"}, {}, {{"timeout", "0"}, {"graceful-timeout", "0"}}},
        {{"--limit-request-line", "0", "--limit-request-field_size=0", "--limit-request-body=0"},
         {},
         {{"limit-request-line", "0"}, {"limit-request-body", "0"}}},
        {{"--log-file", "/x"}, {}, {{"error-logfile", "/x"}}},
        {{"--error-logfile", "/x"}, {}, {{"error-logfile", "/x"}}},
        {{"-e", "A=b=c", "--env=D="}, {}, {{"env", "A=b=c,D="}}},
        {{"-k", "sync"}, {}, {{"worker-class", "sync"}, {"threads", "1"}}},
        {{"-k", "gthread", "--threads=4"}, {}, {{"worker-class", "gthread"}, {"threads", "4"}}},
        {{"--chdir=/a", "--pythonpath", "/b,/c", "--worker-tmp-dir=/d", "--access-logfile=-",
          "--access-logformat=%(s)s", "--python=/e", "--runner=f g", "--log-level=debug"},
         {},
         {{"chdir", "/a"},
          {"pythonpath", "/b,/c"},
          {"worker-tmp-dir", "/d"},
          {"access-logfile", "-"},
          {"access-logformat", "%(s)s"},
          {"python", "/e"},
          {"runner", "f g"},
          {"log-level", "debug"}}},
        {{"--backlog=1", "--worker-connections=1", "--limit-request-fields=1",
          "--header-timeout=1"},
         {},
         {{"backlog", "1"},
          {"header-timeout", "1"},
          {"worker-connections", "1"},
          {"limit-request-fields", "1"}}},
    };
    for (const Row& row : rows) {
        vector<string> args{"--print-config"};
        args.insert(args.end(), row.args.begin(), row.args.end());
        const Ran ran = run_to_end(args, row.env);
        CAPTURE(ran.out);
        CHECK_MESSAGE(ran.code == 0, ran.err);
        CHECK(ran.err == "");
        for (const auto& each : row.settings) {
            CAPTURE(each.first);
            CHECK(setting(ran.out, each.first) == each.second);
        }
    }
}

TEST_CASE("-h names every option, -v the version") {
    for (const string option : {"-h", "--help"}) {
        const Ran help = run_to_end({option}, {"PORT=x", "WEB_CONCURRENCY="});
        CHECK(help.code == 0);
        CHECK(help.err == "");
        CHECK_FALSE(contains(help.out, " \n"));
        for (const string name : {"-b, --bind",
                                  "-w, --workers",
                                  "-t, --timeout",
                                  "--graceful-timeout",
                                  "--backlog",
                                  "--worker-connections",
                                  "--limit-request-line",
                                  "--limit-request-fields",
                                  "--limit-request-field_size",
                                  "--limit-request-body",
                                  "--header-timeout",
                                  "--chdir",
                                  "--pythonpath",
                                  "-e, --env",
                                  "--worker-tmp-dir",
                                  "--access-logfile",
                                  "--access-logformat",
                                  "--error-logfile",
                                  "--log-file",
                                  "--log-level",
                                  "--python",
                                  "--runner",
                                  "-k, ",
                                  "--check-config",
                                  "--print-config",
                                  "-v, ",
                                  "-h, "}) {
            CHECK_MESSAGE(contains(help.out, name), name);
        }
    }
    for (const string option : {"-v", "--version"}) {
        const Ran version = run_to_end({option});
        CHECK(version.code == 0);
        CHECK(contains(version.out, kVersion));
        CHECK(count(version.out, "\n") == 1);
    }
}

/// A socket of ours on a free port of the loopback.
Fd listen_somewhere(string& port, bool listening = true) {
    Fd fd(::socket(AF_INET, SOCK_STREAM, 0));
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof address;
    REQUIRE(::bind(fd.get(), reinterpret_cast<sockaddr*>(&address), size) == 0);
    if (listening) { REQUIRE(::listen(fd.get(), 10) == 0); }
    REQUIRE(::getsockname(fd.get(), reinterpret_cast<sockaddr*>(&address), &size) == 0);
    port = to_string(ntohs(address.sin_port));
    return fd;
}

TEST_CASE("settings that are refused: in a sentence, with the exit status that they have") {
    struct Row {
        vector<string> args;
        int code;
        string text;  // of the sentence
        vector<string> env;
    };
    string busy, unused;
    const Fd listening = listen_somewhere(busy), bound = listen_somewhere(unused, false);
    const string inherited = "fd://" + to_string(listening.get());
    const TempDir dir;
    const string fifo = dir.path + "/fifo";  // which nobody reads
    REQUIRE(::mkfifo(fifo.c_str(), 0666) == 0);
    vector<Row> rows = {
        {{"-w", "0"}, 1, "--workers", {}},
        {{"--forwarded-allow-ips", "::1,localhost"}, 1, "'localhost'", {}},
        {{"--proxy-allow-from", "10.0.0.0/33"}, 1, "--proxy-allow-from", {}},
        {{"-w-1"}, 1, "--workers", {}},
        {{"-w", "x"}, 2, "'x'", {}},
        {{"-w", "4x"}, 2, "'4x'", {}},
        {{"-w", " 4"}, 2, "--workers", {}},
        {{"-w", ""}, 2, "--workers", {}},
        {{"-w"}, 2, "-w", {}},
        {{"--workers="}, 2, "--workers", {}},
        {{}, 1, "WEB_CONCURRENCY", {"WEB_CONCURRENCY=0"}},
        {{}, 1, "FORWARDED_ALLOW_IPS: 'me'", {"FORWARDED_ALLOW_IPS=me"}},
        {{}, 1, "99999", {"PORT=99999"}},
        {{}, 1, "x", {"PORT=x"}},
        {{"-b", "127.0.0.1:99999"}, 1, "99999", {}},
        {{"-b", "127.0.0.1:-1"}, 1, "-1", {}},
        {{"-b", "127.0.0.1:"}, 1, "127.0.0.1:", {}},
        {{"-b", "127.0.0.1:x"}, 1, "127.0.0.1:x", {}},
        {{"-b", ""}, 1, "address", {}},
        {{"-b", "[::1:80"}, 1, "[::1:80", {}},
        {{"-b", "[::1]80"}, 1, "[::1]80", {}},
        {{"-b", "::1:80"}, 1, "::1:80", {}},
        {{"-b", "unix:"}, 1, "unix:", {}},
        {{"-b", "unix:/" + string(200, 'x')}, 1, "unix:", {}},
        {{"-b", "unix:/no/such/directory/sock"}, 1, "/no/such/directory/sock", {}},
        {{"-b", "fd://x"}, 1, "fd://x", {}},
        {{"-b", "fd://-1"}, 1, "fd://-1", {}},
        {{"-b", "fd://123"}, 1, "123", {}},
        {{"-b", "fd://2"}, 1, "descriptor 2 is no listening socket", {}},
        {{"-D", "-p", "/no/such/pid"}, 1, "/no/such/pid", {}},
        {{"--check-config", "-p", "/no/such/pid"}, 1, "/no/such/pid", {}},
        {{"--check-config", "-p", "/proc/pid"}, 1, "cannot write /proc/pid", {}},
        {{}, 1, "temporary file in /no/such/tmp: No such", {"TMPDIR=/no/such/tmp"}},
        {{"-e", "TMPDIR=/no/such/tmp"}, 1, "temporary file in /no/such/tmp: No such", {}},
        {{"-b", "fd://" + to_string(bound.get())}, 1, to_string(bound.get()), {}},
        {{"--access-logfile", fifo}, 1, "cannot open the log " + fifo, {}},
        {{"-p", fifo}, 1, fifo + " exists and is no regular file", {}},
        {{"--check-config", "-p", "/dev/null"}, 1, "/dev/null exists and is no regular file", {}},
        {{"-b", inherited, "-b", inherited}, 1, "is no listening socket, or is named twice", {}},
        {{"-b", "127.0.0.1:" + busy}, 1, "127.0.0.1:" + busy + ": ", {}},
        {{"-b", "192.0.2.1:0"}, 1, "192.0.2.1:0: ", {}},
        {{"-b", string(70, 'x') + ":0"}, 1, "x:0: ", {}},  // longer than a name can be
        {{"--backlog", "1e9"}, 2, "1e9", {}},
        {{"--backlog", "1000000000"}, 1, "1000000000", {}},
        {{"--backlog", "0"}, 1, "--backlog", {}},
        {{"--header-timeout", "0"}, 1, "--header-timeout", {}},
        {{"--worker-connections", "0"}, 1, "--worker-connections", {}},
        {{"--limit-request-fields", "-1"}, 1, "--limit-request-fields", {}},
        {{"--log-level", "loud"}, 1, "loud", {}},
        {{"-k", "gevent"}, 1, "gevent", {}},
        {{"-k", "eventlet"}, 1, "eventlet", {}},
        {{"--threads", "129"}, 1, "--threads", {}},
        {{"--threads", "2", "--runner", "cat"}, 1, "--runner", {}},
        {{"-e", "novalue"}, 1, "novalue", {}},
        {{"-e", "=x"}, 1, "=x", {}},
        {{"--chdir", "/no/such/directory"}, 1, "/no/such/directory", {}},
        {{"--error-logfile", "/no/such/log"}, 1, "/no/such/log", {}},
        {{"--log-file=/no/such/log"}, 1, "/no/such/log", {}},
        {{"--access-logfile", "/no/such/log"}, 1, "/no/such/log", {}},
        {{"--access-logfile", "/"}, 1, "/: ", {}},
        {{"--no-such-option"}, 2, "--no-such-option", {}},
        {{"--work", "3"}, 2, "--work", {}},
        {{"-Z"}, 2, "-Z", {}},
        {{"--check-config=yes"}, 2, "--check-config", {}},
        {{"--bind"}, 2, "--bind", {}},
        {{"app:app", "other:app"}, 2, "other:app", {}},
        {{"app:app", "--", "other:app"}, 2, "other:app", {}},
        {{"--", "app:app", "-w"}, 2, "-w", {}},
    };
    for (const string name :
         {"workers", "timeout", "graceful-timeout", "header-timeout", "backlog",
          "worker-connections", "threads", "limit-request-line", "limit-request-fields",
          "limit-request-field_size", "limit-request-body"}) {
        rows.push_back({{"--" + name + "=-1"}, 1, "--" + name, {}});
        rows.push_back({{"--" + name, "x"}, 2, "--" + name, {}});
        rows.push_back({{"--" + name, "1.5"}, 2, "--" + name, {}});
        rows.push_back({{"--" + name, "99999999999999999999"}, 1, "--" + name, {}});
        if (name != "limit-request-body") {
            rows.push_back({{"--" + name, "9999999999"}, 1, "--" + name, {}});
        }
    }
    for (const Row& row : rows) {
        string shown;
        for (const string& word : row.args) { shown += word + " "; }
        CAPTURE(shown);
        const Ran ran = run_to_end(row.args, row.env);
        CHECK_MESSAGE(ran.code == row.code, ran.err);
        CHECK(count(ran.err, "\n") == 1);
        CHECK_MESSAGE(contains(ran.err, row.text), ran.err);
        CHECK(ran.out == "");
    }
    const Ran ran = run_to_end({}, {"WEB_CONCURRENCY=many"});
    CHECK(ran.code > 0);
    CHECK(contains(ran.err, "WEB_CONCURRENCY"));
}

TEST_CASE("an app that cannot be loaded is exit 4, a runner that cannot run 3, checked or not") {
    struct Row {
        string app;
        vector<string> args;
        int code;
        string text;
    };
    const string python = "/usr/bin/python3";
    const vector<Row> rows = {
        {"import nothing_of_the_kind\n", {"app:app"}, 4, "nothing_of_the_kind"},
        {"def app(:\n", {"app:app"}, 4, "SyntaxError"},
        {"x = 1 / 0\n", {"app:app"}, 4, "app.py\", line 1"},
        {"app = 5\n", {"app:app"}, 4, "callable"},
        {"", {"app:app"}, 4, "module 'app' has no attribute 'app'"},
        {kHello, {"other:app"}, 4, "No module named 'other'"},
        {kHello, {"app"}, 4, "module 'app' has no attribute 'application'"},
        {kHello, {"app:other(1)"}, 4, "module 'app' has no attribute 'other'"},
        {"import sys\nsys.exit(0)\n", {"app:app"}, 4, ""},
        {kHello, {"app:app", "--python", "/no/such/python"}, 3, "/no/such/python"},
        {kHello, {"--runner", "/no/such/runner"}, 3, "/no/such/runner"},
    };
    for (const Row& row : rows) {
        for (const bool check : {false, true}) {
            vector<string> args{"-w", "1", "-b", "127.0.0.1:0"};
            if (row.code == 4) { args.insert(args.end(), {"--python", python}); }
            args.insert(args.end(), row.args.begin(), row.args.end());
            if (check) { args.emplace_back("--check-config"); }
            CAPTURE(row.app);
            CAPTURE(check);
            const Ran ran = run_to_end(args, {}, row.app);
            CHECK(ran.code == row.code);
            CHECK_MESSAGE(contains(ran.err, row.text), ran.err);
            CHECK(contains(ran.err, "Shutting down: Master") == !check);
        }
    }
    const Ran good = run_to_end({"--check-config", "--python", python, "-w", "9", "app:app"});
    CHECK(good.code == 0);
    CHECK_MESSAGE(good.err == "", good.err);
    CHECK(run_to_end({"--check-config", "--python", python, "-b", "x:99999", "app:app"}).code == 1);
    const TempDir dir;  // of a server that runs: its pid file is no fault of the configuration
    write_file(dir.path + "/pid", to_string(::getpid()));
    CHECK(run_to_end({"--check-config", "--python", python, "-p", dir.path + "/pid", "app:app"})
              .code == 0);
    const string factory = string("def make(n):\n    return app\none = 1\n") + kHello;
    for (const char* name : {"app:make(1)", "app:make(one)", "app:make.__globals__['app']"}) {
        CHECK(run_to_end({"--check-config", "--python", python, name}, {}, factory).code == 0);
    }
    if (!may_become_and_see_others().first) { return; }
    // As another user, who may not read what root may.
    const Ran other = run_to_end({"--check-config", "--python", python, "-u", "nobody", "app:app"});
    CHECK(other.code == 4);
    CHECK_MESSAGE(contains(other.err, "No module named 'app'"), other.err);
}

TEST_CASE("a worker that cannot load the app later does not end the server") {
    Server server(kHello, {"-w", "1"});
    const vector<pid_t> before = server.workers();
    REQUIRE(before.size() == 1);
    write_file(server.dir.path + "/app.py", "import nothing_of_the_kind\n");
    ::kill(before[0], SIGKILL);
    REQUIRE(server.log_has("nothing_of_the_kind"));
    write_file(server.dir.path + "/app.py", kHello);
    CHECK(get(server).status == 200);  // it waits in the backlog
    CHECK_FALSE(server.ended());
}

/// Which file a path leads to, without following a link; {0, 0}: none.
std::pair<dev_t, ino_t> identity(const string& path) {
    struct stat info = {};
    if (::lstat(path.c_str(), &info) < 0) { return {0, 0}; }
    return {info.st_dev, info.st_ino};
}

/// Whether somebody listens on a unix socket.
bool listens(const string& path) {
    sockaddr_un name{};
    name.sun_family = AF_UNIX;
    path.copy(name.sun_path, sizeof name.sun_path - 1);
    const Fd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    return ::connect(fd.get(), reinterpret_cast<sockaddr*>(&name), sizeof name) == 0;
}

/// Binds a unix socket of ours, and listens if wanted.
Fd bind_unix_socket(const string& path, bool listening) {
    Fd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    path.copy(address.sun_path, sizeof address.sun_path - 1);
    REQUIRE(::bind(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof address) == 0);
    if (listening) { REQUIRE(::listen(fd.get(), 16) == 0); }
    return fd;
}

bool exists(const string& path) { return identity(path).second != 0; }

TEST_CASE("a unix socket: a stale one is replaced, the file goes when the server does") {
    for (const int number : {SIGTERM, SIGINT, SIGQUIT}) {
        const TempDir dir;
        const string path = dir.path + "/sock";
        { const Fd stale = bind_unix_socket(path, true); }
        REQUIRE(exists(path));
        Server server(kHello, {"-w", "1", "-b", "unix:" + path});
        CHECK(contains(server.log(), "Listening at: unix:" + path + " ("));
        CHECK(exchange(Client(path), "GET / HTTP/1.1\r\n\r\n").body == "hello\n");
        server.signal(number);
        REQUIRE(server.wait_end());
        CHECK(server.exit_code() == 0);
        CHECK_FALSE(exists(path));
        CHECK(contains(server.log(), number == SIGTERM  ? "Handling signal: term"
                                     : number == SIGINT ? "Handling signal: int"
                                                        : "Handling signal: quit"));
    }
    const TempDir dir;
    const string path = dir.path + "/sock";
    const vector<string> bind{"-b", "unix:" + path, "--python", "/usr/bin/python3"};
    CHECK(run_to_end({bind[0], bind[1], bind[2], bind[3], "app:app"}, {}, "1 / 0\n").code == 4);
    CHECK_FALSE(exists(path));
    CHECK(run_to_end({bind[0], bind[1], "-b", "fd://123", "app:app"}).code == 1);
    CHECK_FALSE(exists(path));
    CHECK(run_to_end({bind[0], bind[1], bind[2], bind[3], "--check-config", "app:app"}).code == 0);
    CHECK_FALSE(exists(path));
}

TEST_CASE("a server that is long in leaving does not take its successor's unix socket along") {
    const TempDir dir;
    const string path = dir.path + "/sock";
    const vector<string> args{"-w", "1", "-b", "unix:" + path};
    Server old(string(kHello) + R"py(
import atexit, os, time

@atexit.register
def wait():
    while not os.path.exists("go"): time.sleep(0.005)
)py",
               args);
    old.signal(SIGTERM);
    CHECK(wait_for([&] { return !listens(path); }));
    const Server successor(kHello, args);  // whose socket may well have the same inode
    CHECK(exchange(Client(path), "GET / HTTP/1.1\r\n\r\n").body == "hello\n");
    write_file(old.dir.path + "/go", "");
    REQUIRE(old.wait_end());
    CHECK(exchange(Client(path), "GET / HTTP/1.1\r\n\r\n").body == "hello\n");
}

TEST_CASE("a live unix socket is never stolen, another kind of file never removed") {
    const TempDir dir;
    const string live = dir.path + "/live", file = dir.path + "/file", link = dir.path + "/link";
    const Fd owner = bind_unix_socket(live, true);
    write_file(file, "precious");
    REQUIRE(::symlink("nowhere", link.c_str()) == 0);
    for (const string& path : {live, file, dir.path, link}) {
        CAPTURE(path);
        const auto before = identity(path);
        const Ran ran = run_to_end({"-b", "unix:" + path, "app:app"});
        CHECK(ran.code == 1);
        CHECK(count(ran.err, "\n") == 1);
        CHECK(contains(ran.err, path));
        CHECK(identity(path) == before);
    }
    CHECK(read_file(file) == "precious");
    const Client still_there(live);

    for (const bool socket : {false, true}) {  // the path is another's when the server ends
        CAPTURE(socket);
        const string path = dir.path + (socket ? "/one" : "/two");
        Server server(kHello, {"-w", "1", "-b", "unix:" + path});
        REQUIRE(::unlink(path.c_str()) == 0);
        Fd other;
        if (socket) { other = bind_unix_socket(path, true); }
        if (!socket) { write_file(path, "precious"); }
        server.signal(SIGTERM);
        REQUIRE(server.wait_end());
        CHECK(exists(path));
    }
}

/// Connects to [::1]; no descriptor where the machine has no such address.
Fd connect_v6(int port) {
    Fd fd(::socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_in6 address{};
    address.sin6_family = AF_INET6;
    address.sin6_port = htons(static_cast<uint16_t>(port));
    address.sin6_addr = in6addr_loopback;
    if (!fd || ::connect(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof address) < 0) {
        fd.reset();
    }
    return fd;
}

bool have_v6() {
    const Fd fd(::socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_in6 address{};
    address.sin6_family = AF_INET6;
    address.sin6_addr = in6addr_loopback;
    return ::bind(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof address) == 0;
}

TEST_CASE("several addresses: all listed, all served, each with its own name") {
    const TempDir dir;
    const string path = dir.path + "/sock";
    string port;
    const Fd inherited = listen_somewhere(port);  // not close-on-exec
    const string fd = "fd://" + to_string(inherited.get());
    vector<string> args{"-w1", "-b", "127.0.0.1:0", "-b", ":0", "--bind=" + fd, "-bunix:" + path};
    const bool v6 = have_v6();
    if (v6) { args.insert(args.end(), {"-b", "[::1]:0", "-b", "[::]:0"}); }
    const Server server(kProbe, args);
    string line = server.log().substr(server.log().find("Listening at: "));
    line = line.substr(0, line.find('\n'));
    CHECK(line == "Listening at: http://127.0.0.1:" + to_string(server.port(0)) +
                      ",http://0.0.0.0:" + to_string(server.port(1)) + ",http://127.0.0.1:" + port +
                      ",unix:" + path +
                      (v6 ? ",http://[::1]:" + to_string(server.port(3)) +
                                ",http://[::]:" + to_string(server.port(4))
                          : "") +
                      " (" + to_string(server.pid) + ")");
    for (size_t i = 0; i < 3; ++i) {  // the second is a wildcard: the connection's own address
        const string body = exchange(Client(server.port(i)), http("GET /")).body;
        CAPTURE(body);
        CHECK(has_line(body, "SERVER_NAME=127.0.0.1"));
        CHECK(has_line(body, "SERVER_PORT=" + to_string(server.port(i))));
    }
    CHECK(server.port(2) == std::atoi(port.c_str()));
#ifdef TCP_NOTSENT_LOWAT
    int unsent = 0;  // or a slow reader's socket would be writable too rarely
    socklen_t size = sizeof unsent;
    ::getsockopt(inherited.get(), IPPROTO_TCP, TCP_NOTSENT_LOWAT, &unsent, &size);
    CHECK(unsent == 128 * 1024);
#endif
    CHECK(exchange(Client(path), http("GET /")).status == 200);
    if (!v6) { MESSAGE("no ::1 on this machine"); }
    for (size_t i = 3; v6 && i < 5; ++i) {
        Client client(server);
        client.fd = connect_v6(server.port(i));
        REQUIRE(client.fd);
        client.send(http("GET /"));
        const string body = Reply(client.read_all()).body;
        CAPTURE(body);
        CHECK(has_line(body, "SERVER_NAME=::1"));
        CHECK(has_line(body, "SERVER_PORT=" + to_string(server.port(i))));
        CHECK(has_line(body, "REMOTE_ADDR=::1"));
    }
    if (v6) {  // a v6 literal leaves the v4 port free
        const Server both(kHello, {"-w1", "-b", ":" + to_string(server.port(4))});
        CHECK(get(both).status == 200);
    }
}

TEST_CASE("the port is free again at once, also where connections linger in TIME_WAIT") {
    string bind;
    {
        Server first(kHello, {"-w", "1"});
        CHECK(get(first).status == 200);
        bind = "127.0.0.1:" + to_string(first.port());
        first.signal(SIGTERM);
        REQUIRE(first.wait_end());
        CHECK(first.exit_code() == 0);
    }
    const Server second(kHello, {"-w", "1", "-b", bind});
    CHECK(get(second).status == 200);
}

TEST_CASE("log files, log level, heartbeat directory, and connections lowered to what fits") {
    const TempDir dir;
    const string log_path = dir.path + "/error.log";
    Server server(string("print('the app prints', flush=True)\n") + kHello,
                  {"-w", "1", "--error-logfile", log_path, "--worker-tmp-dir", dir.path,
                   "--worker-connections", "9999", "--log-level", "warning"},
                  {}, false);
    REQUIRE(server.wait_ready_workers(1));
    const string text = read_file(log_path);
    CAPTURE(text);
    CHECK(server.log() == "");
    CHECK(contains(text, "the app prints\n"));
    CHECK(contains(text, "[WARNING] --worker-connections lowered from 9999 to "));
    CHECK_FALSE(contains(text, "[INFO]"));
    const Server debug(kHello, {"-w", "1", "--log-level", "debug"});
    CHECK(get(debug, "/x").status == 200);
    CHECK(debug.log_has("[DEBUG] GET /x HTTP/1.1\n"));
    CHECK(contains(debug.log(), "[DEBUG] Current configuration:\n"));
    CHECK(contains(debug.log(), "\nworkers                   = 1\n"));
    bool heartbeat = false;
    const string fds = "/proc/" + to_string(server.pid) + "/fd";
    const std::unique_ptr<DIR, int (*)(DIR*)> list(::opendir(fds.c_str()), ::closedir);
    while (const dirent* entry = list ? ::readdir(list.get()) : nullptr) {
        char target[500] = "";
        (void)!::readlink((fds + "/" + entry->d_name).c_str(), target, sizeof target - 1);
        heartbeat = heartbeat || (contains(target, dir.path) && contains(target, "(deleted)"));
    }
    CHECK(heartbeat);
}

TEST_CASE("--runner starts any program that speaks the protocol of the bridge") {
    const Server server(R"py(
import os, sys
data = b""
def more():
    global data
    piece = os.read(0, 65536)
    if not piece: sys.exit()
    data += piece
os.write(1, b"0:,")
while True:
    while b":" not in data: more()
    size, _, data = data.partition(b":")
    while len(data) <= int(size): more()
    head, data = data[:int(size)], data[int(size) + 1:]
    if not head: continue
    env = head.split(b"\0")
    while len(data) < int(env[1] or 0): more()
    data = data[int(env[1] or 0):]
    text = b"Status: 200 OK\nX-A: b\n\n" + env[0] + b"=" + env[1]
    os.write(1, b"%d:%s,2:!\n,0:," % (len(text), text))
)py",
                        {"-w", "1", "--runner", "/usr/bin/python3 app.py"});
    const Reply reply = post(server, "/", "abcde");
    CHECK(reply.status == 200);
    CHECK(field(reply, "x-a") == "b");
    CHECK(reply.body == "CONTENT_LENGTH=5!\n");
    CHECK(get(server).body == "CONTENT_LENGTH=!\n");
}

bool alive(pid_t pid) {
    const char state = parent_and_state(pid).second;
    return state != ' ' && state != 'Z';
}

bool have(const char* program) {
    ::signal(SIGCHLD, SIG_DFL);  // before main(): were it ignored, no status would come
    return std::system((string("command -v ") + program + " >/dev/null 2>&1").c_str()) == 0;
}

/// A program that runs beside the server until the end of the test.
struct Program {
    pid_t pid;
    explicit Program(vector<string> words, const std::function<void()>& before = nullptr) {
        pid = ::fork();
        if (pid == 0) {
            const int null = ::open("/dev/null", O_RDWR);
            for (const int fd : {0, 1, 2}) { ::dup2(null, fd); }
            if (before) { before(); }
            vector<char*> argv;
            for (string& word : words) { argv.push_back(word.data()); }
            argv.push_back(nullptr);
            ::execvp(argv[0], argv.data());
            ::_exit(127);
        }
    }
    ~Program() {
        int status = 0;
        ::kill(pid, SIGTERM);
        const bool ended = wait_for([&] { return ::waitpid(pid, &status, WNOHANG) == pid; });
        CHECK(ended);
        if (ended) { return; }
        ::kill(pid, SIGKILL);
        ::waitpid(pid, &status, 0);
    }
};

/// The numbers behind a name in /proc/PID/status.
string status_of(pid_t pid, const string& name) {
    const string status = read_file("/proc/" + to_string(pid) + "/status");
    const size_t at = status.find("\n" + name + ":") + name.size() + 2;
    return string(trim(string_view(status).substr(at, status.find('\n', at) - at)));
}

/// How many system calls of a process have read ("syscr") or written ("syscw").
long calls_of(pid_t pid, const string& kind) {
    const string io = read_file("/proc/" + to_string(pid) + "/io");
    return std::atol(io.c_str() + io.find(kind + ": ") + kind.size() + 2);
}

/// Sends TERM; whether the process has gone soon.
bool ends_by_term(pid_t pid) {
    ::kill(pid, SIGTERM);
    return wait_for([&] { return !alive(pid); });
}

bool has_pid(const vector<pid_t>& pids, pid_t pid) {
    return std::find(pids.begin(), pids.end(), pid) != pids.end();
}

/// Whether `n` workers run, none of them one of those before.
bool all_new(const Server& server, const vector<pid_t>& before, size_t n) {
    const vector<pid_t> now = server.workers();
    return now.size() == n &&
           std::none_of(now.begin(), now.end(), [&](pid_t pid) { return has_pid(before, pid); });
}

TEST_CASE("the standard error log is still stderr after a HUP, and logs are opened again") {
    const Server server(kHello, {"-w", "1"});
    const string access = server.dir.path + "/access";
    CHECK(get(server).status == 200);
    CHECK(server.access_has("GET /"));
    const vector<pid_t> before = server.workers();
    REQUIRE(::rename(access.c_str(), (access + ".1").c_str()) == 0);
    server.signal(SIGHUP);
    CHECK(server.log_has("Handling signal: hup"));
    REQUIRE(wait_for([&] { return all_new(server, before, 1); }));
    CHECK(count(server.log(), "Booting worker with pid: ") == 2);
    CHECK(get(server, "/new").status == 200);
    CHECK(server.access_has("GET /new"));
    server.signal(SIGUSR1);
    CHECK(server.log_has("Handling signal: usr1"));
    CHECK_FALSE(wait_for([&] { return exists(server.dir.path + "/-"); }, 300ms));
}

// --- processes: the arbiter, its workers and runners ------------------------

/// What most applications below begin with: the path names the function that answers.
const string kTools = R"py(
import io, os, signal, subprocess, sys, threading, time

def reply(start_response, body, status="200 OK"):
    body = body if isinstance(body, bytes) else str(body).encode()
    start_response(status, [("Content-Length", str(len(body)))])
    return [body]

def mark(name, text="x"):
    with open(name, "a") as file:
        file.write(text)

def wait(name):
    while not os.path.exists(name):
        time.sleep(0.005)

def app(environ, start_response):
    return globals()[environ["PATH_INFO"][1:]](environ, start_response)

def hello(environ, start_response):
    return reply(start_response, "hello")

def gate(environ, start_response):
    mark("at_gate")
    wait("go")
    return reply(start_response, "through")

def leave(environ, start_response):
    os._exit(7)

def endless(environ, start_response):
    start_response("200 OK", [])
    while True:
        yield b"more"
        time.sleep(0.01)
)py";

/// Waits for a file that the application makes; `size` bytes at least.
bool wait_file(const Server& server, const string& name, size_t size = 1) {
    return wait_for([&] { return read_file(server.dir.path + "/" + name).size() >= size; });
}

void open_gate(const Server& server) { write_file(server.dir.path + "/go", ""); }

string get_bytes(const string& target) { return "GET " + target + " HTTP/1.1\r\nHost: x\r\n\r\n"; }

/// So many clients that have sent these bytes.
vector<Client> hold(const Server& server, size_t n, const string& bytes) {
    vector<Client> held;
    for (size_t i = 0; i < n; ++i) {
        held.emplace_back(server);
        held.back().send(bytes);
    }
    return held;
}

/// Whether nobody listens on a port of this host.
bool refused(int port) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    const Fd fd(::socket(AF_INET, SOCK_STREAM, 0));
    return ::connect(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof address) < 0;
}

/// Keeps `n` clients asking for `target` as long as `more()`, and says how often each answer came:
/// "200 hello", or "cut". Behind a target that ends with "=" comes the number of the request.
map<string, int> load(const Server& server, size_t n, const string& target,
                      const std::function<bool()>& more) {
    map<string, int> answers;
    vector<std::unique_ptr<Client> > clients(n);
    vector<string> texts(n);
    vector<Time> starts(n);
    size_t open = 0, serial = 0;
    for (bool going = true; (going = going && more()) || open > 0; ::poll(nullptr, 0, 1)) {
        for (size_t i = 0; i < n; ++i) {
            if (!clients[i] && !going) { continue; }
            if (!clients[i]) {
                clients[i] = std::make_unique<Client>(server);
                const string number = target.back() == '=' ? to_string(++serial) : "";
                clients[i]->send(get_bytes(target + number));
                texts[i].clear();
                starts[i] = Clock::now();
                ++open;
            }
            char buffer[65536];
            const bool late = Clock::now() > starts[i] + 20s;
            const ssize_t got = clients[i]->readable(0ms)
                                    ? ::recv(clients[i]->fd.get(), buffer, sizeof buffer, 0)
                                : late ? 0
                                       : -2;
            if (got == -2) { continue; }
            if (got > 0) {
                texts[i].append(buffer, static_cast<size_t>(got));
                continue;
            }
            const Reply reply(texts[i]);
            ++answers[reply.whole ? to_string(reply.status) + " " + reply.body : "cut"];
            clients[i].reset();
            --open;
        }
    }
    return answers;
}

string show_answers(const map<string, int>& answers) {
    string text;
    for (const auto& [answer, times] : answers) {
        text += to_string(times) + " × " + answer + "\n";
    }
    return text;
}

TEST_CASE("an arbiter, two workers and two runners serve; Ctrl-C ends them within a second") {
    Server server(kHello);
    REQUIRE(server.wait_ready_workers(2));
    const vector<pid_t> workers = server.workers();
    CHECK(workers.size() == 2);
    CHECK(server.runners().size() == 2);
    CHECK(processes_with(server.mark).size() == 5);
    const Reply reply = get(server);
    CHECK(reply.status == 200);
    CHECK(reply.body == "hello\n");
    const Time start = Clock::now();
    ::kill(-server.pid, SIGINT);  // the runners are in groups of their own
    REQUIRE(server.wait_end());
    CHECK(wait_for([&] { return processes_with(server.mark).empty(); }));
    CHECK(seconds_since(start) < 1.2);
    CHECK(server.exit_code() == 0);
    const string log = server.log();
    for (const string& line :
         {"[" + to_string(server.pid) + "] [INFO] Starting server " + kVersion,
          "Listening at: http://127.0.0.1:" + to_string(server.port()) + " (" +
              to_string(server.pid) + ")",
          string("Using worker: sync"), string("Handling signal: int"),
          string("Shutting down: Master"), "Booting worker with pid: " + to_string(workers[0]),
          "Worker exiting (pid: " + to_string(workers[1]) + ")"}) {
        CAPTURE(line);
        CHECK_MESSAGE(contains(log, line), log);
    }
    CHECK_MESSAGE(!contains(log, "Traceback"), log);
    CHECK_MESSAGE(!contains(log, "[ERROR]"), log);
}

TEST_CASE("a graceful stop finishes what was begun, and atexit handlers run") {
    Server server(kTools + "import atexit\natexit.register(mark, 'left')\n");
    REQUIRE(server.wait_ready_workers(2));
    const int port = server.port();
    Client running(port), half_head(port), half_body(port);
    half_head.send("GET /hello HTTP/1.1\r\nHo");
    half_body.send("POST /hello HTTP/1.1\r\nContent-Length: 6\r\nExpect: 100-continue\r\n\r\n");
    CHECK(contains(half_body.read_until([](const string& t) { return contains(t, "\r\n\r\n"); }),
                   "100 Continue"));
    half_body.send("abc");
    running.send(get_bytes("/gate"));
    REQUIRE(wait_file(server, "at_gate"));
    server.signal(SIGTERM);
    CHECK(server.log_has("Handling signal: term"));
    CHECK(wait_for([&] { return refused(port); }));
    half_head.send("st: x\r\n\r\n");
    half_body.send("def");
    CHECK(!server.ended());
    open_gate(server);
    CHECK(Reply(running.read_all()).body == "through");
    CHECK(Reply(half_head.read_all()).body == "hello");
    CHECK(Reply(half_body.read_all()).body == "hello");
    REQUIRE(server.wait_end());
    CHECK(server.exit_code() == 0);
    CHECK(read_file(server.dir.path + "/left").size() >= 2);
    CHECK_MESSAGE(count(server.log(), "Worker exiting (pid: ") == 2, server.log());
}

TEST_CASE("a graceful stop serves what the kernel holds, more than --worker-connections, too") {
    Server server(kTools + R"py(
def quick(environ, start_response):
    time.sleep(0.01)
    return reply(start_response, "quick")
)py",
                  {"-w", "1", "--worker-connections", "4"});
    const pid_t worker = server.worker();
    freeze(worker);  // it is a moment late
    vector<Client> clients;
    for (int i = 0; i < 60; ++i) {
        clients.emplace_back(server);
        clients.back().send(get_bytes("/quick"));
    }
    server.signal(SIGTERM);
    CHECK(server.log_has("Handling signal: term"));
    ::kill(worker, SIGCONT);
    int good = 0;
    for (Client& client : clients) { good += Reply(client.read_all()).body == "quick" ? 1 : 0; }
    CHECK(good == 60);
    CHECK(server.wait_end());
}

TEST_CASE("a server that is idle stops at once, gracefully or not") {
    for (const int number : {SIGTERM, SIGQUIT, SIGTERM, SIGINT}) {
        Server server(kHello);
        REQUIRE(server.wait_ready_workers(2));
        ::poll(nullptr, 0, 150);  // into the long sleep of who has nothing to do
        const Time start = Clock::now();
        server.signal(number);
        CHECK(server.wait_end());
        CHECK(seconds_since(start) < 0.6);
        CHECK_FALSE(contains(server.log(), "[ERROR]"));
    }
}

TEST_CASE("INT hastens a graceful stop") {
    Server server(kTools, {"-w", "1"});
    Client client(server);
    client.send(get_bytes("/gate"));
    REQUIRE(wait_file(server, "at_gate"));
    server.signal(SIGTERM);
    REQUIRE(server.log_has("Handling signal: term"));
    CHECK(!server.wait_end(200ms));
    server.signal(SIGINT);
    CHECK(server.wait_end(1500ms));
    CHECK(server.exit_code() == 0);
    CHECK(Reply(client.read_all()).status == 503);
    CHECK(server.log_has("503 to 127.0.0.1: the server stops: GET /gate HTTP/1.1"));
}

/// Bytes that have come for the connections to a port of this machine, and nobody has read.
size_t unread(int port) {
    std::istringstream lines(read_file("/proc/net/tcp"));
    string line;
    size_t bytes = 0;
    while (std::getline(lines, line)) {
        unsigned local = 0, state = 0, queued = 0;
        const char* format = "%*d: %*x:%x %*x:%*x %x %*x:%x";
        const bool known = std::sscanf(line.c_str(), format, &local, &state, &queued) == 3;
        if (known && local == static_cast<unsigned>(port) && state == 1) { bytes += queued; }
    }
    return bytes;
}

TEST_CASE(
    "an application that waits for SIGTERM to end its threads gets it when its runner is done") {
    Server server(kTools + R"py(
import signal, sys, threading

end = threading.Event()

def on_term(*_):
    mark("cleaned")
    end.set()
    sys.exit(0)

signal.signal(signal.SIGTERM, on_term)
threading.Thread(target=end.wait).start()

class slow_close(list):
    def __init__(self, environ, start_response):
        start_response("200 OK", [])
        super().__init__([b"x"])

    def close(self):
        wait("go")
        mark("closed")
)py",
                  {"-w", "1"});
    const vector<pid_t> before = server.workers();
    Client running(server);
    running.send(get_bytes("/gate"));
    REQUIRE(wait_file(server, "at_gate"));
    server.signal(SIGHUP);
    REQUIRE(wait_for([&] { return server.ready_workers() == 1 && server.workers().size() == 2; }));
    CHECK_FALSE(exists(server.dir.path + "/cleaned"));  // it has a request still
    open_gate(server);
    CHECK(Reply(running.read_all()).body == "through");
    CHECK(wait_for([&] { return all_new(server, before, 1); }));
    CHECK(read_file(server.dir.path + "/cleaned") != "");
    for (const string name : {"/cleaned", "/go"}) {
        REQUIRE(::unlink((server.dir.path + name).c_str()) == 0);
    }
    Client closing(server);
    closing.send(get_bytes("/slow_close"));
    CHECK(Reply(closing.read_all()).body == "x");
    server.signal(SIGTERM);
    CHECK_FALSE(wait_for([&] { return exists(server.dir.path + "/cleaned"); }, 300ms));
    open_gate(server);
    REQUIRE(server.wait_end());
    CHECK(exists(server.dir.path + "/closed"));
    CHECK(exists(server.dir.path + "/cleaned"));
    CHECK_FALSE(contains(server.log(), "[ERROR]"));
}

TEST_CASE("a graceful stop takes no longer than the graceful timeout") {
    Server server(kTools, {"-w", "1", "--graceful-timeout", "1"});
    Client lingers(server), client(server);
    lingers.send(get_bytes("/hello") + get_bytes("/hello"));
    CHECK(Reply(lingers.read_all()).body == "hello");
    client.send(get_bytes("/gate"));
    REQUIRE(wait_file(server, "at_gate"));
    const Time start = Clock::now();
    server.signal(SIGTERM);
    CHECK(server.wait_end());
    CHECK(wait_for([&] { return processes_with(server.mark).empty(); }));
    CHECK(seconds_since(start) > 0.9);
    CHECK(seconds_since(start) < 2);
    CHECK(server.exit_code() == 0);
    CHECK_FALSE(contains(server.log(), "Cut off"));  // who lingers has all of his response
}

TEST_CASE("a worker that cannot stop is killed, and the log says by whom") {
    Server server(kTools, {"-w", "1"});
    const pid_t worker = server.worker();
    freeze(worker);
    server.signal(SIGINT);
    CHECK(server.wait_end());
    CHECK(contains(server.log(), "Worker (pid:" + to_string(worker) +
                                     ") was ended by signal 9 (Killed), sent by this server"));
}

TEST_CASE("who resizes the terminal during a graceful stop costs nobody an answer") {
    Server server(kTools, {"-w", "1"});
    Client runs(server);
    runs.send(get_bytes("/gate"));
    REQUIRE(wait_file(server, "at_gate"));
    vector<Client> waiting = hold(server, 3, get_bytes("/hello"));  // soon in the queue
    server.signal(SIGTERM);
    REQUIRE(server.log_has("Handling signal: term"));
    CHECK_FALSE(runs.readable(100ms));
    ::kill(server.worker(), SIGWINCH);  // as the whole foreground group gets it
    open_gate(server);
    CHECK(Reply(runs.read_all()).body == "through");
    for (Client& each : waiting) { CHECK(Reply(each.read_all()).body == "hello"); }
    CHECK(server.wait_end());
}

TEST_CASE("what the graceful timeout cuts off is answered, or visibly cut, and has its lines") {
    for (const int number : {SIGTERM, SIGHUP}) {
        CAPTURE(number);
        Server server(kTools + R"py(
def large(environ, start_response):
    return reply(start_response, bytes(20000000))
)py",
                      {"-w", "1", "--graceful-timeout", "1"});
        Client::receive_buffer = 4096;
        Client slow(server);
        Client::receive_buffer = 0;
        slow.send(get_bytes("/large"));
        string some = slow.read_until([](const string& text) { return text.size() > 1000; });
        Client runs(server), begun(server);
        runs.send(get_bytes("/gate"));
        REQUIRE(wait_file(server, "at_gate"));
        begun.send("GET /hel");
        Client waits(server);
        waits.send(get_bytes("/hello"));
        CHECK(wait_for([&] { return unread(server.port()) == 0; }));
        const vector<pid_t> old = server.workers();
        server.signal(number);
        const bool stays = number == SIGHUP;  // then the next worker takes what has not begun
        CHECK(Reply(waits.read_all()).status == (stays ? 200 : 503));
        if (stays) { begun.send("lo HTTP/1.1\r\n\r\n"); }
        CHECK(Reply(begun.read_all()).status == (stays ? 200 : 503));
        CHECK(Reply(runs.read_all()).status == 503);
        const Reply cut(some + slow.read_all());
        CHECK(cut.status == 200);
        CHECK_FALSE(cut.whole);
        CHECK(wait_for([&] { return server.workers() != old; }));
        CHECK(server.log_has("The graceful timeout is over"));
        CHECK(server.log_has("503 to 127.0.0.1: the graceful timeout is over: GET /gate HTTP/1.1"));
        CHECK(server.log_has("Cut off: GET /large HTTP/1.1"));
        CHECK_FALSE(contains(server.log(), "signal 9"));
        const string access = read_file(server.dir.path + "/access");
        CHECK(count(access, "\"GET /gate HTTP/1.1\" 503") == 1);
        CHECK(count(access, "\"GET /large HTTP/1.1\" 200") == 1);
        CHECK(count(access, "\n") == 4);
        if (!stays) { CHECK(server.wait_end()); }
    }
}

TEST_CASE("a reload hands over no unfinished request behind one that waits for a runner") {
    Server server(kTools, {"-w", "1", "--header-timeout", "1"});
    const vector<pid_t> before = server.workers();
    vector<Client> running = hold(server, 3, get_bytes("/gate"));
    REQUIRE(wait_file(server, "at_gate"));
    Client unfinished(server);
    unfinished.send("GET /hello HTTP/1.1\r\nHo");
    CHECK(wait_for([&] { return unread(server.port()) == 0; }));
    server.signal(SIGHUP);
    CHECK(Reply(unfinished.read_all(5s)).status == 408);
    unfinished.fd.reset();  // or the old worker would linger
    open_gate(server);
    for (Client& each : running) { CHECK(Reply(each.read_all()).body == "through"); }
    CHECK(wait_for([&] { return all_new(server, before, 1); }));
}

TEST_CASE("but what is unfinished when the graceful timeout ends is handed over all the same") {
    Server server(kTools, {"-w", "1", "--graceful-timeout", "1"});
    const vector<pid_t> before = server.workers();
    vector<Client> running = hold(server, 3, get_bytes("/gate"));
    REQUIRE(wait_file(server, "at_gate"));
    Client upload(server);
    upload.send("POST /hello HTTP/1.1\r\nContent-Length: 6\r\n\r\nabc");
    CHECK(wait_for([&] { return unread(server.port()) == 0; }));
    server.signal(SIGHUP);
    CHECK(wait_for([&] { return all_new(server, before, 1); }, 10s));
    open_gate(server);
    for (size_t i = 1; i < running.size(); ++i) {
        CHECK(Reply(running[i].read_all()).body == "through");
    }
    upload.send("def");
    CHECK(Reply(upload.read_all()).body == "hello");
}

TEST_CASE("a reload without a graceful timeout hands over what has not begun") {
    const Server server(kTools, {"-w", "1", "--graceful-timeout", "0"});
    const vector<pid_t> before = server.workers();
    Client half(server);
    half.send("GET /hel");
    CHECK(wait_for([&] { return unread(server.port()) == 0; }));
    server.signal(SIGHUP);
    CHECK(wait_for([&] { return all_new(server, before, 1); }));
    half.send("lo HTTP/1.1\r\n\r\n");
    CHECK(Reply(half.read_all()).body == "hello");
}

TEST_CASE("a full worker that gives up answers who is in the queue, too") {
    Server server(kTools, {"-w", "1", "--graceful-timeout", "1", "--worker-connections", "2"});
    Client runs(server);
    runs.send(get_bytes("/gate"));
    REQUIRE(wait_file(server, "at_gate"));
    vector<Client> clients;
    for (int i = 0; i < 5; ++i) {
        clients.emplace_back(server).send(get_bytes("/hello"));
        CHECK(wait_for([&] { return unread(server.port()) == 0; }));
    }
    server.signal(SIGTERM);
    CHECK(Reply(runs.read_all()).status == 503);
    for (Client& client : clients) { CHECK(Reply(client.read_all()).status == 503); }
    CHECK(server.wait_end());
    CHECK(count(server.access(), " 503 ") == 6);
}

TEST_CASE("a stop works while the application is still being imported") {
    for (const int number : {SIGTERM, SIGINT}) {
        CAPTURE(number);
        Server server(kTools + "mark('importing')\ntime.sleep(60)\n", {}, {}, false);
        REQUIRE(wait_file(server, "importing", 2));
        server.signal(number);
        CHECK(server.wait_end(1500ms));
        CHECK(server.exit_code() == 0);
    }
}

TEST_CASE("-t 0 is no limit: neither for the application, nor for a body, nor for a worker") {
    Server server(kTools + R"py(

def echo(environ, start_response):
    return reply(start_response, environ["wsgi.input"].read())
)py",
                  {"-t", "0"});
    REQUIRE(server.wait_ready_workers(2));
    const vector<pid_t> workers = server.workers();
    Client slow(server), body(server);
    slow.send(get_bytes("/gate"));
    body.send("POST /echo HTTP/1.1\r\nContent-Length: 4\r\n\r\nbo");
    REQUIRE(wait_file(server, "at_gate"));
    CHECK_FALSE(slow.readable(1200ms));
    CHECK_FALSE(body.readable(0ms));
    open_gate(server);
    body.send("dy");
    CHECK(Reply(slow.read_all()).body == "through");
    CHECK(Reply(body.read_all()).body == "body");
    CHECK(server.workers() == workers);
}

TEST_CASE("an application that takes longer than --timeout to load is told of, and served then") {
    Server server(kTools + "wait('go')\n", {"-w", "1", "-t", "1"}, {}, false);
    REQUIRE(server.log_has("still loads the application"));
    const vector<pid_t> runners = server.runners();
    REQUIRE(runners.size() == 1);
    CHECK(contains(server.log(), "Runner (pid:" + to_string(runners[0]) + ") still loads"));
    open_gate(server);
    REQUIRE(server.wait_ready_workers(1));
    CHECK(get(server, "/hello").body == "hello");
    CHECK(server.runners() == runners);
    CHECK(count(server.log(), "still loads") == 1);
}

TEST_CASE("a server whose first workers cannot boot ends, and says why") {
    struct Row {
        const char *title, *app;
        vector<string> args;
        int code;
        vector<const char*> log;
    };
    const Row rows[] = {
        {"an import error",
         "x = 1\nimport nothing_of_that_name\n",
         {},
         4,
         {"app.py\", line 2, in <module>", "ModuleNotFoundError", "App failed to load."}},
        {"a syntax error", "def app(:\n", {}, 4, {"app.py\", line 1", "SyntaxError"}},
        {"no such object", "", {"app:nothing"}, 4, {"'nothing'", "App failed to load."}},
        {"no such module", "", {"app_nothing:app"}, 4, {"No module named 'app_nothing'"}},
        {"not callable", "app = 1\n", {}, 4, {"app:app is not callable"}},
        {"an exit in the module", "import sys\nsys.exit(0)\n", {}, 4, {"App failed to load."}},
        {"no such python",
         kHello,
         {"--python", "/nonexistent/python3"},
         3,
         {"cannot run /nonexistent/python3", "Worker failed to boot."}},
        {"no such runner",
         kHello,
         {"--runner", "/nonexistent/runner"},
         3,
         {"Worker failed to boot."}},
    };
    for (const Row& row : rows) {
        CAPTURE(string(row.title));
        Server server(row.app, row.args, {}, false);
        CHECK(server.wait_end(15s));
        CHECK_MESSAGE(server.exit_code() == row.code, server.log());
        for (const char* text : row.log) { CHECK_MESSAGE(contains(server.log(), text), text); }
    }
}

TEST_CASE("workers that fail to boot back off, say so once a step, and the others serve") {
    Server server(kTools, {"-w", "2"});
    REQUIRE(server.wait_ready_workers(2));
    write_file(server.dir.path + "/app.py", "an application that does not parse\n");
    ::kill(server.worker(), SIGKILL);
    CHECK(server.log_has("was ended by signal 9"));
    CHECK(server.log_has("starts in 1 s"));
    CHECK(get(server, "/hello").status == 200);
    CHECK(server.log_has("starts in 2 s", 20s));
    write_file(server.dir.path + "/app.py", kTools);
    CHECK(get(server, "/hello").status == 200);
    CHECK(server.wait_ready_workers(2));
    CHECK_MESSAGE(count(server.log(), "starts in ") == 2, server.log());
    CHECK(contains(server.log(), "SyntaxError"));
    CHECK(!server.ended());
}

TEST_CASE("workers that fail together count as one step of the back-off") {
    Server server(kTools, {"-w", "4"});
    REQUIRE(server.wait_ready_workers(4));
    write_file(server.dir.path + "/app.py", "an application that does not parse\n");
    for (const pid_t pid : server.workers()) { ::kill(pid, SIGKILL); }
    CHECK(server.log_has("starts in 2 s", 20s));
    CHECK(count(server.log(), "starts in 1 s") == 1);
    CHECK_FALSE(contains(server.log(), "starts in 4 s"));
    write_file(server.dir.path + "/app.py", kTools);
    CHECK(server.wait_ready_workers(4));
    CHECK(get(server, "/hello").status == 200);
}

TEST_CASE("two workers that are lost together, once, have successors at once") {
    Server server(kTools, {"-w", "2"});
    REQUIRE(server.wait_ready_workers(2));
    const vector<pid_t> before = server.workers();
    freeze(server.pid);  // it hears of both in one moment
    for (const pid_t pid : before) { ::kill(pid, SIGKILL); }
    server.signal(SIGCONT);
    CHECK(wait_for([&] { return all_new(server, before, 2); }));
    CHECK(get(server, "/hello").status == 200);
    CHECK_FALSE(contains(server.log(), "starts in "));
}

TEST_CASE("of too many workers those go first that are not ready") {
    Server server(kTools + R"py(
if os.path.exists("slow"):
    mark("importing")
    wait("go")
)py",
                  {"-w", "1"});
    REQUIRE(server.wait_ready_workers(1));
    const vector<pid_t> first = server.workers();
    write_file(server.dir.path + "/slow", "");
    server.signal(SIGTTIN);
    REQUIRE(wait_file(server, "importing"));
    server.signal(SIGTTOU);
    CHECK(wait_for([&] { return server.workers().size() == 1; }));
    CHECK(server.workers() == first);
    CHECK(get(server, "/hello", 1s).body == "hello");
}

TEST_CASE("TTIN adds a worker, TTOU ends one, but never the last") {
    Server server(kHello, {"-w", "1"});
    CHECK(server.wait_ready_workers(1));
    const pid_t first = server.worker();
    server.signal(SIGTTIN);
    CHECK(server.wait_ready_workers(2));
    CHECK(server.workers().size() == 2);
    server.signal(SIGTTOU);
    CHECK(wait_for([&] { return server.workers().size() == 1; }));
    CHECK_FALSE(has_pid(server.workers(), first));  // the oldest goes, as with gunicorn
    server.signal(SIGTTOU);
    CHECK(wait_for([&] { return count(server.log(), "Handling signal: ttou") == 2; }));
    server.signal(SIGTTIN);
    CHECK(server.wait_ready_workers(2));  // and not one: the second TTOU changed nothing
    CHECK(get(server).status == 200);
    CHECK(wait_for([&] { return server.workers().size() == 2; }));
}

TEST_CASE("a reload under load fails no request, and one of a broken application changes nothing") {
    const auto version = [](const string& text) {
        return "def app(environ, start_response):\n"
               "    start_response('200 OK', [('Content-Length', '" +
               to_string(text.size()) + "')])\n    return [b'" + text + "']\n";
    };
    Server server(version("v1"), {"-w", "2"});
    REQUIRE(server.wait_ready_workers(2));
    const string file = server.dir.path + "/app.py";
    vector<pid_t> before = server.workers();
    const Time start = Clock::now();
    int reloads = 0;
    map<string, int> answers = load(server, 4, "/", [&] {
        if (reloads == 0 && seconds_since(start) > 0.4) {
            write_file(file, version("v22"));
            server.signal(SIGHUP);
            ++reloads;
        } else if (reloads == 1 && seconds_since(start) > 1.7) {
            write_file(file, version("v333"));
            server.signal(SIGHUP);
            ++reloads;
        } else if (reloads == 2 && seconds_since(start) > 1.71) {
            server.signal(SIGHUP);  // while the workers of the last one boot
            ++reloads;
        }
        return seconds_since(start) < 3;
    });
    CAPTURE(show_answers(answers));
    CHECK(answers.size() == 3);
    for (const char* answer : {"200 v1", "200 v22", "200 v333"}) { CHECK(answers[answer] > 0); }
    CHECK(wait_for([&] { return server.workers().size() == 2; }));
    for (const pid_t pid : server.workers()) { CHECK(!has_pid(before, pid)); }
    CHECK(get(server).body == "v333");

    before = server.workers();
    write_file(file, "this does not parse\n");
    server.signal(SIGHUP);
    CHECK_MESSAGE(server.log_has("Reload failed"), server.log());
    CHECK(server.log_has("SyntaxError"));
    CHECK(get(server).body == "v333");
    CHECK(server.workers() == before);
    write_file(file, version("v4444"));
    server.signal(SIGHUP);
    CHECK(wait_for([&] { return get(server).body == "v4444"; }));
    CHECK(wait_for([&] { return all_new(server, before, 2); }));
    CHECK(get(server).body == "v4444");
}

TEST_CASE("a frozen worker is replaced; a stop of the arbiter, or of all, kills nobody") {
    Server server(kHello, {"-w", "2", "-t", "2"});
    REQUIRE(server.wait_ready_workers(2));
    const pid_t frozen = server.worker();
    const Time start = Clock::now();
    ::kill(frozen, SIGSTOP);
    CHECK(get(server).status == 200);
    CHECK(wait_for([&] { return !alive(frozen) && server.workers().size() == 2; }));
    CHECK(server.wait_ready_workers(2));
    CHECK(seconds_since(start) < 5);
    CHECK(server.log_has("WORKER TIMEOUT (pid:" + to_string(frozen) + ")"));

    const vector<pid_t> workers = server.workers();
    const size_t timeouts = count(server.log(), "WORKER TIMEOUT");
    server.signal(SIGSTOP);
    for (const pid_t pid : workers) { ::kill(pid, SIGSTOP); }
    ::poll(nullptr, 0, 2600);  // longer than the timeout
    server.signal(SIGCONT);
    ::poll(nullptr, 0, 300);  // the arbiter comes first, and looks
    for (const pid_t pid : workers) { ::kill(pid, SIGCONT); }
    CHECK(get(server).status == 200);
    CHECK(!wait_for([&] { return count(server.log(), "WORKER TIMEOUT") > timeouts; }, 700ms));
    CHECK(server.workers() == workers);
}

TEST_CASE("a hung application gets its client 504, and harms no other client of its worker") {
    Server server(kTools + R"py(

def in_c(environ, start_response):
    mark("pid", str(os.getpid()) + " ")
    sum(range(10 ** 11))

def swallows(environ, start_response):
    mark("pid", str(os.getpid()) + " ")
    while True:
        try:
            time.sleep(1)
        except BaseException:
            pass

def blocks(environ, start_response):
    mark("pid", str(os.getpid()) + " ")
    signal.pthread_sigmask(signal.SIG_SETMASK, range(1, signal.NSIG))
    while True:
        time.sleep(1)

def stops_midway(environ, start_response):
    mark("pid", str(os.getpid()) + " ")
    start_response("200 OK", [])
    yield b"begun"
    time.sleep(60)
)py",
                  {"-w", "1", "-t", "1"});
    struct Row {
        const char* name;
        int status;
        bool stack;  // a signal can reach it
    };
    const Row rows[] = {{"in_c", 504, true},
                        {"swallows", 504, true},
                        {"blocks", 504, false},
                        {"stops_midway", 200, true}};
    string pids;
    for (const Row& row : rows) {
        CAPTURE(string(row.name));
        const size_t old = server.log().size();
        Client other(server), hung(server);
        other.send("GET /hello HTTP/1.1\r\nHo");
        const Time start = Clock::now();
        hung.send(get_bytes(string("/") + row.name + "?q=1"));
        REQUIRE(wait_file(server, "pid", pids.size() + 2));
        const Reply reply(hung.read_all());
        CHECK(seconds_since(start) < 2.5);
        CHECK(seconds_since(start) > 0.9);
        CHECK(reply.status == row.status);
        CHECK(reply.whole == (row.status == 504));
        CHECK_FALSE(hung.was_reset);
        other.send("st: x\r\n\r\n");
        CHECK(Reply(other.read_all()).body == "hello");
        const string all = read_file(server.dir.path + "/pid");
        const string pid = all.substr(pids.size(), all.size() - pids.size() - 1);
        pids = all;
        const string log = server.log().substr(old);
        CHECK_MESSAGE(contains(log, "WORKER TIMEOUT (pid:" + pid + ")"), log);
        CHECK_MESSAGE(contains(log, string("GET /") + row.name + "?q=1"), log);
        CHECK_MESSAGE(contains(log, string("in ") + row.name + "\n") == row.stack, log);
        CHECK(server.access_has(string("GET /") + row.name + "?q=1 HTTP/1.1\" " +
                                to_string(row.status)));
        CHECK(wait_for([&] { return !alive(std::atoi(pid.c_str())); }));
    }
    CHECK(count(server.log(), "Booting worker") == 1);
}

TEST_CASE("kill -9 of a runner under load loses its own request alone, with a 502") {
    Server server(kTools + R"py(

def slow(environ, start_response):
    subprocess.Popen(["sleep", "60"])  # which holds all that it could inherit
    mark("pid", str(os.getpid()) + " ")
    wait("go")
)py");
    REQUIRE(server.wait_ready_workers(2));
    Client victim(server);
    victim.send(get_bytes("/slow"));
    REQUIRE(wait_file(server, "pid", 2));
    const Time start = Clock::now();
    bool killed = false;
    const map<string, int> answers = load(server, 4, "/hello", [&] {
        if (!killed && seconds_since(start) > 0.3) {
            ::kill(std::atoi(read_file(server.dir.path + "/pid").c_str()), SIGKILL);
            killed = true;
        }
        return seconds_since(start) < 1;
    });
    CHECK_MESSAGE(answers.size() == 1, show_answers(answers));
    CHECK(answers.count("200 hello") == 1);
    CHECK(Reply(victim.read_all()).status == 502);
    CHECK(server.log_has("was ended by signal 9 (Killed): GET /slow HTTP/1.1"));
    CHECK(server.access_has("GET /slow HTTP/1.1\" 502"));
    CHECK(wait_for([&] { return server.runners().size() == 2; }));
    CHECK(processes_with(server.mark).size() == 5);

    for (const pid_t idle : server.runners()) { ::kill(idle, SIGKILL); }
    CHECK(wait_for([&] { return count(server.log(), "was ended by signal 9 (Killed)") == 3; }));
    CHECK(get(server, "/hello").body == "hello");
}

/// Notes each request in a file, so that one that runs twice is seen.
constexpr const char* kOnce = R"py(

runs = os.open("runs", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

def once(environ, start_response):
    os.write(runs, environ["QUERY_STRING"].encode() + b"\n")
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]

def jitter(environ, start_response):
    time.sleep(hash(environ["QUERY_STRING"]) % 10 / 5000)  # 0 to 1.8 ms
    return once(environ, start_response)

class Closing(list):
    def close(self):
        time.sleep(0.001)

def ignore(environ, start_response):  # its body
    start_response("200 OK", [("Content-Length", "2")])
    return Closing([b"ok"])
)py";

/// Each line of the file "runs", how often it stands there.
map<string, int> runs_of(const Server& server) {
    map<string, int> runs;
    std::istringstream lines(read_file(server.dir.path + "/runs"));
    for (string line; std::getline(lines, line);) { ++runs[line]; }
    return runs;
}

/// Load by 16 clients while runners are killed, `kills` times, `least` to `least` + `more`
/// milliseconds apart, and ten requests: without any progress their starts back off.
map<string, int> load_and_kill(const Server& server, const string& target, int kills, int least,
                               size_t more) {
    Time next = Clock::now() + 100ms;
    size_t done = 0;  // requests, before the last kill
    Random random;
    return load(server, 16, target, [&] {
        if (Clock::now() < next) { return kills > 0; }
        const vector<pid_t> runners = server.runners();
        if (!runners.empty() && runs_of(server).size() >= done + 10) {
            done = runs_of(server).size();
            ::kill(runners[random.below(runners.size())], SIGKILL);
            --kills;
        }
        next =
            Clock::now() + std::chrono::milliseconds(least + static_cast<int>(random.below(more)));
        return kills > 0;
    });
}

TEST_CASE("runners that are killed at any moment cost a request each, and none runs twice") {
    Server server(kTools + kOnce);
    REQUIRE(server.wait_ready_workers(2));
    const int kills = 12;
    map<string, int> answers = load_and_kill(server, "/once?id=", kills, 60, 50);
    CAPTURE(show_answers(answers));
    const int good = answers["200 ok"], bad = answers["502 502 Bad Gateway\n"];
    CHECK(answers.size() == 2);
    CHECK(good > 100);
    CHECK(bad <= kills);
    const map<string, int> runs = runs_of(server);
    CHECK(static_cast<int>(runs.size()) >= good);
    CHECK(static_cast<int>(runs.size()) <= good + bad);
    for (const auto& each : runs) { CHECK(each.second == 1); }
}

TEST_CASE("requests that take about a millisecond run once each, though many are taken back") {
    Server server(kTools + kOnce);
    REQUIRE(server.wait_ready_workers(2));
    const Time end = Clock::now() + 1500ms;
    map<string, int> answers = load(server, 16, "/jitter?id=", [&] { return Clock::now() < end; });
    CHECK_MESSAGE(answers.size() == 1, show_answers(answers));
    const map<string, int> runs = runs_of(server);
    CHECK(static_cast<int>(runs.size()) == answers["200 ok"]);
    for (const auto& each : runs) { CHECK(each.second == 1); }
    CHECK_FALSE(contains(server.log(), "[ERROR]"));
}

TEST_CASE("bodies that the application does not read cost no other request anything") {
    Server server(kTools + kOnce, {"-w", "1"});
    const Time end = Clock::now() + 2s;
    int posts = 0, good = 0;
    map<string, int> answers = load(server, 16, "/once?id=", [&] {
        const size_t size = ++posts % 2 != 0 ? 5000 : 200000;
        good += post(server, "/ignore", string(size, 'x')).body == "ok" ? 1 : 0;
        return Clock::now() < end;
    });
    CHECK(good == posts);
    CHECK(posts > 50);
    CHECK_MESSAGE(answers.size() == 1, show_answers(answers));
    const map<string, int> runs = runs_of(server);
    CHECK(static_cast<int>(runs.size()) == answers["200 ok"]);
    CHECK_FALSE(contains(server.log(), "[ERROR]"));
}

TEST_CASE("what was handed to a quick runner ahead of time comes back when that turns slow") {
    Server server(kTools + kOnce);
    REQUIRE(server.wait_ready_workers(2));
    int sent = 0;
    for (int round = 0; round < 6; ++round) {
        const Time warm_end = Clock::now() + 100ms;
        (void)load(server, 8, "/hello", [&] { return Clock::now() < warm_end; });
        vector<Client> clients;
        for (int i = 0; i < 25; ++i) { clients.emplace_back(server); }
        const Time start = Clock::now();
        for (size_t i = 0; i < clients.size(); ++i) {
            clients[i].send(get_bytes(i == 6 ? "/gate" : "/once?" + to_string(++sent)));
        }
        for (size_t i = 0; i < clients.size(); ++i) {
            if (i != 6) { CHECK(Reply(clients[i].read_all(3s)).body == "ok"); }
        }
        CHECK(seconds_since(start) < 0.3);
        open_gate(server);
        CHECK(Reply(clients[6].read_all()).body == "through");
        ::unlink((server.dir.path + "/go").c_str());
    }
    const map<string, int> runs = runs_of(server);
    CHECK(static_cast<int>(runs.size()) == sent);
    for (const auto& each : runs) { CHECK(each.second == 1); }
    CHECK(server.runners().size() == 2);
}

TEST_CASE("kill -9 of the arbiter leaves no process behind, whatever the application does") {
    Server server(kTools + R"py(

def hang(environ, start_response):
    subprocess.Popen(["sleep", "60"])
    signal.pthread_sigmask(signal.SIG_SETMASK, range(1, signal.NSIG))
    mark("hung")
    while True:
        time.sleep(1)
)py",
                  {"-w", "3"});
    REQUIRE(server.wait_ready_workers(3));
    Client hung(server), busy(server);
    hung.send(get_bytes("/hang"));
    busy.send(get_bytes("/gate"));
    REQUIRE(wait_file(server, "hung"));
    REQUIRE(wait_file(server, "at_gate"));
    CHECK(wait_for([&] { return processes_with(server.mark).size() == 8; }));
    server.signal(SIGKILL);
    CHECK(server.wait_end());
    CHECK(wait_for([&] { return processes_with(server.mark).empty(); }, 3s));
}

TEST_CASE("after kill -9 of the arbiter another can start at once at the same address") {
    Server first(kHello, {"-w", "2"});
    const string address = "127.0.0.1:" + to_string(first.port());
    first.signal(SIGKILL);
    REQUIRE(first.wait_end());
    const Server second(kHello, {"-b", address});
    CHECK(get(second).body == "hello\n");
}

TEST_CASE("a worker whose runner is busy accepts and refuses at all of its addresses") {
    Server server(kTools, {"-w", "1", "-b", "127.0.0.1:0", "-b", "127.0.0.1:0"});
    Client busy(server);
    busy.send(get_bytes("/gate"));
    REQUIRE(wait_file(server, "at_gate"));
    for (const size_t i : {0u, 1u}) {
        CHECK(request(server.port(i), "no request\r\n\r\n").status == 400);
    }
    open_gate(server);
    CHECK(Reply(busy.read_all()).body == "through");
}

TEST_CASE("nobody waits for a busy runner while another is idle") {
    Server server(kTools);
    REQUIRE(server.wait_ready_workers(2));
    vector<Client> early;
    for (int i = 0; i < 20; ++i) {
        early.emplace_back(server);
        early.back().send("GET /hello HTTP/1.1\r\nHo");
    }
    for (int i = 0; i < 200; ++i) { CHECK(get(server, "/hello").body == "hello"); }  // to the same
    Client slow(server);
    slow.send(get_bytes("/gate"));  // until all others have been answered
    REQUIRE(wait_file(server, "at_gate"));
    const auto quick = [](Client& client, const string& bytes) {
        const Time start = Clock::now();
        client.send(bytes);
        CHECK(Reply(client.read_all(3s)).body == "hello");
        return seconds_since(start);
    };
    double longest = 0;
    for (Client& client : early) { longest = std::max(longest, quick(client, "st: x\r\n\r\n")); }
    CHECK(longest < 0.3);
    for (int i = 0; i < 20; ++i) {
        Client client(server);
        longest = std::max(longest, quick(client, get_bytes("/hello")));
    }
    CHECK(longest < 0.3);
    vector<Client> together;
    for (int i = 0; i < 20; ++i) { together.emplace_back(server); }
    const Time start = Clock::now();
    for (Client& client : together) { client.send(get_bytes("/hello")); }
    for (Client& client : together) { CHECK(Reply(client.read_all(3s)).body == "hello"); }
    CHECK(seconds_since(start) < 0.6);
    open_gate(server);
    CHECK(Reply(slow.read_all()).body == "through");
}

TEST_CASE("a worker with a busy runner leaves clients to an idle one") {
    const Server server(kTools);
    REQUIRE(server.wait_ready_workers(2));
    Client slow(server);
    slow.send(get_bytes("/gate"));
    REQUIRE(wait_file(server, "at_gate"));
    map<pid_t, long> reads;
    for (const pid_t pid : server.workers()) { reads[pid] = calls_of(pid, "syscr"); }
    const Time start = Clock::now();
    for (int i = 0; i < 500; ++i) { CHECK(get(server, "/hello").body == "hello"); }
    const double took = seconds_since(start);
    long least = LONG_MAX;  // those of the busy one
    for (const auto& [pid, before] : reads) {
        least = std::min(least, calls_of(pid, "syscr") - before);
    }
    CHECK(least < 40 + 120 * took);
    open_gate(server);
    CHECK(Reply(slow.read_all()).body == "through");
}

TEST_CASE("after one quick request among slow ones nobody is overtaken by all who wait") {
    const Server server(kTools + R"py(
def numbered(environ, start_response):
    number = environ["QUERY_STRING"]
    mark("order", number + " ")
    if int(number) % 10: time.sleep(0.01)
    return reply(start_response, number)
)py",
                        {"-w", "1", "-t", "0"});
    Client running(server);
    running.send(get_bytes("/gate"));
    REQUIRE(wait_file(server, "at_gate"));
    vector<Client> clients;
    for (int i = 1; i <= 60; ++i) {
        clients.emplace_back(server).send(get_bytes("/numbered?" + to_string(i)));
        CHECK(wait_for([&] { return unread(server.port()) == 0; }));
    }
    open_gate(server);
    for (Client& each : clients) { CHECK(Reply(each.read_all()).status == 200); }
    std::istringstream order(read_file(server.dir.path + "/order"));
    int latest = 0, place = 0;
    for (int number = 0; order >> number;) { latest = std::max(latest, ++place - number); }
    CHECK(place == 60);
    CHECK(latest < 12);
}

TEST_CASE("a request that no runner takes for as long as the timeout gets 503 with Retry-After") {
    Server server(kTools + R"py(

def trickle(environ, start_response):  # never silent for long: it is not hung
    start_response("200 OK", [])
    while not os.path.exists("go"):
        yield b"x"
        time.sleep(0.1)
)py",
                  {"-w", "1", "-t", "2"});
    Client busy(server), waiting(server);
    busy.send(get_bytes("/trickle"));
    busy.read_until([](const string& text) { return contains(text, "x"); });
    const Time start = Clock::now();
    waiting.send(get_bytes("/hello"));
    Reply reply(waiting.read_all());
    CHECK(reply.status == 503);
    CHECK(seconds_since(start) > 1.9);
    CHECK(seconds_since(start) < 3.5);
    CHECK(std::atoi(reply.fields["retry-after"].c_str()) > 0);
    CHECK(server.access_has("GET /hello HTTP/1.1\" 503"));
    Client patient(server);
    patient.send(get_bytes("/hello"));
    open_gate(server);
    CHECK(contains(busy.read_all(), "\r\n0\r\n\r\n"));
    CHECK(Reply(patient.read_all()).status == 200);
    CHECK(!contains(server.log(), "WORKER TIMEOUT"));
}

TEST_CASE("a runner that ends over a request is replaced at once, however often one does") {
    const Server server(kTools, {"-w", "1"});
    const Time start = Clock::now();
    for (int i = 0; i < 6; ++i) { CHECK(get(server, "/leave").status == 502); }
    CHECK(get(server, "/hello").status == 200);
    CHECK(seconds_since(start) < 10);  // with a back-off they would take 30
    CHECK(server.log_has("exited with status 7: GET /leave HTTP/1.1"));
    CHECK_MESSAGE(!contains(server.log(), "The next runner starts in"), server.log());
}

TEST_CASE("a runner that has served and dies idle is followed at once, however often") {
    const Server server(kTools, {"-w", "1"});
    for (int i = 0; i < 3; ++i) {
        CHECK(get(server, "/hello").body == "hello");
        const vector<pid_t> before = server.runners();
        ::kill(before.at(0), SIGKILL);
        CHECK(wait_for([&] { return server.runners().size() == 1 && server.runners() != before; }));
    }
    CHECK(get(server, "/hello").body == "hello");
    CHECK(count(server.log(), "was ended by signal 9") == 3);
    CHECK_FALSE(contains(server.log(), "The next runner starts in"));
}

TEST_CASE("starts of a runner back off while they bring none that takes a request") {
    const Server server("import os\nif os.path.exists('down'): os._exit(7)\n" + kTools,
                        {"-w", "1"});
    const string down = server.dir.path + "/down";
    write_file(down, "");
    CHECK(get(server, "/leave").status == 502);
    const Time start = Clock::now();
    CHECK(server.log_has("The next runner starts in 1 s"));
    CHECK(server.log_has("The next runner starts in 2 s"));
    CHECK(seconds_since(start) > 0.9);
    CHECK(::unlink(down.c_str()) == 0);
    CHECK(get(server, "/hello").status == 200);
    CHECK(seconds_since(start) > 2.9);
    CHECK(get(server, "/leave").status == 502);
    const Time again = Clock::now();
    CHECK(get(server, "/hello").status == 200);
    CHECK(seconds_since(again) < 0.7);
    CHECK_MESSAGE(count(server.log(), "The next runner starts in") == 2, server.log());
}

TEST_CASE("successors of a runner back off while none loads, and the old one serves on") {
    const Server server(kTools, {"-w", "1", "--max-requests", "2"});
    const string path = server.dir.path + "/app.py", good = read_file(path);
    write_file(path, "broken = [");
    const auto failed = [&](size_t n) {
        return wait_for([&] {
            CHECK(get(server, "/hello").body == "hello");
            return count(server.log(), "SyntaxError") >= n;
        });
    };
    CHECK(failed(1));
    const Time start = Clock::now();
    CHECK(failed(3));
    CHECK(seconds_since(start) > 2.5);
    write_file(path, good);
    const Time now = Clock::now();  // 4 s before the next would start; but this one has served
    REQUIRE(::kill(server.runner(), SIGKILL) == 0);
    CHECK(server.log_has(") was ended by signal 9"));
    CHECK(get(server, "/hello").body == "hello");
    CHECK(seconds_since(now) < 2.5);
}

TEST_CASE("an application that answers HEAD in two pieces is not cut off between them") {
    const Server server(kTools + R"py(
def writes(environ, start_response):
    write = start_response("200 OK", [])
    write(b"1")
    time.sleep(0.05)
    write(b"2")
    mark("wrote")
    return []

def yields(environ, start_response):
    start_response("200 OK", [])
    yield b"1"
    time.sleep(0.05)
    yield b"2"
    mark("yielded")
)py",
                        {"-w", "1"});
    CHECK(request(server.port(), "HEAD /writes HTTP/1.1\r\nHost: x\r\n\r\n").status == 200);
    CHECK(wait_file(server, "wrote"));
    CHECK(request(server.port(), "HEAD /yields HTTP/1.1\r\nHost: x\r\n\r\n").status == 200);
    CHECK(wait_file(server, "yielded"));
    CHECK_FALSE(contains(server.log(), "Traceback"));
}

TEST_CASE(
    "who comes first is served first: nobody who comes back at once gets ahead of the others") {
    const Server server(kTools + R"py(
def nap(environ, start_response):
    time.sleep(float(environ["QUERY_STRING"]))
    return reply(start_response, "rested")
)py",
                        {"-w", "2"});
    REQUIRE(server.wait_ready_workers(2));
    constexpr int kClients = 8, kRequests = 200;
    std::list<Client> clients;
    int served[kClients] = {}, all = 0;
    vector<Client*> asking;
    const auto ask = [&] {
        clients.emplace_back(server).send(get_bytes(all % 3 == 0 ? "/nap?0.03" : "/nap?0.003"));
        return &clients.back();
    };
    for (int i = 0; i < kClients; ++i) { asking.push_back(ask()); }
    while (all < kRequests) {
        vector<pollfd> waiting;
        for (const Client* each : asking) { waiting.push_back({each->fd.get(), POLLIN, 0}); }
        REQUIRE(::poll(waiting.data(), waiting.size(), 5000) > 0);
        for (size_t i = 0; i < kClients; ++i) {
            if (waiting[i].revents == 0) { continue; }
            REQUIRE(Reply(asking[i]->read_all()).status == 200);
            asking[i]->fd.reset();
            asking[i] = ask();
            ++served[i], ++all;
        }
    }
    for (const int each : served) {
        CHECK_MESSAGE(each >= kRequests / kClients - 5, "of 25: " << each);
    }
}

TEST_CASE("requests in the ready queue survive the death of the worker that read them") {
    Server server(kTools, {"-w", "2"});
    REQUIRE(server.wait_ready_workers(2));
    const auto sockets = [&] {  // of clients, that workers hold
        size_t n = 0;
        for (const pid_t worker : server.workers()) {
            const string name = "/proc/" + to_string(worker) + "/fd";
            const std::unique_ptr<DIR, int (*)(DIR*)> fds(::opendir(name.c_str()), ::closedir);
            while (const dirent* entry = fds ? ::readdir(fds.get()) : nullptr) {
                char link[64] = "";
                (void)!::readlink((name + "/" + entry->d_name).c_str(), link, sizeof link - 1);
                n += contains(link, "socket:") ? 1 : 0;
            }
        }
        return n;
    };
    vector<Client> busy;
    for (size_t i = 1; i <= 2; ++i) {
        busy.emplace_back(server);
        busy.back().send(get_bytes("/gate"));
        REQUIRE(wait_file(server, "at_gate", i));
    }
    const size_t before = sockets();
    vector<Client> queued;
    const string large(200000, 'b');  // its body goes in a file
    for (int i = 0; i < 6; ++i) {
        queued.emplace_back(server);
        const string body = i == 0 ? large : "body";
        queued.back().send("POST /hello HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: " +
                           to_string(body.size()) + "\r\n\r\n");
        queued.back().read_until([](const string& t) { return contains(t, "\r\n\r\n"); });
        queued.back().send(body);
    }
    REQUIRE(wait_for([&] { return sockets() == before; }));
    const pid_t worker = server.worker();
    const vector<pid_t> orphans = server.children(worker);
    REQUIRE(orphans.size() == 1);
    ::kill(worker, SIGKILL);
    CHECK(wait_for([&] { return !alive(orphans[0]); }, 3s));
    open_gate(server);
    for (Client& client : queued) { CHECK(Reply(client.read_all()).body == "hello"); }
    const string first = busy[0].read_all(), second = busy[1].read_all();
    CHECK((first.empty() != second.empty()));
}

TEST_CASE("a head too large for the ready queue holds up nobody else") {
    Server server(kTools, {"-w", "2", "--limit-request-field_size", "400000"});
    REQUIRE(server.wait_ready_workers(2));
    const vector<pid_t> workers = server.workers();
    freeze(workers[1]);  // so that the other accepts all that follows
    Client busy(server), huge(server), small(server);
    busy.send(get_bytes("/gate"));
    REQUIRE(wait_file(server, "at_gate"));
    for (const auto& [client, field] : {std::pair<Client&, string>{huge, string(300000, 'h')},
                                        std::pair<Client&, string>{small, "s"}}) {
        client.send(
            "POST /hello HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 4\r\n"
            "X-Field: " +
            field + "\r\n\r\n");
        CHECK(contains(client.read_until([](const string& t) { return contains(t, "\r\n\r\n"); }),
                       "100 Continue"));
        client.send("body");
    }
    ::kill(workers[1], SIGCONT);
    CHECK(Reply(small.read_all(2s)).body == "hello");  // by the idle runner
    open_gate(server);
    CHECK(Reply(busy.read_all()).body == "through");
    CHECK(Reply(huge.read_all()).body == "hello");
}

TEST_SUITE_END();

// --- the Python runner ------------------------------------------------------
TEST_SUITE_BEGIN("runners");

/// For a query string.
string encode(const string& text) {
    string out;
    for (const char c : text) {
        char hex[4];
        std::snprintf(hex, sizeof hex, "%%%02X", static_cast<unsigned char>(c));
        out += hex;
    }
    return out;
}

string chunked(const string& body, size_t piece) {
    std::ostringstream out;
    for (size_t at = 0; at < body.size(); at += piece) {
        const string part = body.substr(at, piece);
        out << std::hex << part.size() << "\r\n" << part << "\r\n";
    }
    return out.str() + "0\r\n\r\n";
}

string post_bytes(const string& target, const string& body, bool chunks,
                  const string& fields = "") {
    return "POST " + target + " HTTP/1.1\r\nHost: x\r\n" + fields +
           (chunks ? "Transfer-Encoding: chunked\r\n\r\n" + chunked(body, 10000)
                   : "Content-Length: " + to_string(body.size()) + "\r\n\r\n" + body);
}

TEST_CASE("wsgiref.validate has no complaint") {
    Server server(R"py(
from wsgiref.validate import validator

def echo(environ, start_response):
    length = int(environ.get("CONTENT_LENGTH") or 0)
    body = environ["wsgi.input"].read(length)
    start_response("200 OK", [("Content-Type", "text/plain"), ("X-Method",
                              environ["REQUEST_METHOD"])])
    return [b"<", body, b">"]

app = validator(echo)
)py",
                  {"-w", "1"});
    const string large(300000, 'z');
    struct Row {
        string bytes, method, body;
    };
    const Row rows[] = {
        {get_bytes("/a%20b?c=d"), "GET", "<>"},
        {"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n", "HEAD", ""},
        {post_bytes("/", "abc", false), "POST", "<abc>"},
        {post_bytes("/", "abc", true), "POST", "<abc>"},
        {post_bytes("/", large, true), "POST", "<" + large + ">"},
        {"GET / HTTP/1.0\r\n\r\n", "GET", "<>"},
    };
    for (const Row& row : rows) {
        CAPTURE(row.bytes.substr(0, 60));
        Reply reply = request(server.port(), row.bytes);
        CHECK(reply.status == 200);
        CHECK(reply.fields["x-method"] == row.method);
        CHECK(reply.body == row.body);
    }
    const string log = server.log();
    for (const char* complaint : {"Error", "Warning", "Traceback", "closed"}) {
        CHECK_MESSAGE(!contains(log, complaint), log);
    }
}

TEST_CASE("wsgi.input reads as a file of the body does") {
    Server server(R"py(
import hashlib, io
from urllib.parse import unquote

def app(environ, start_response):
    body = eval(environ["HTTP_X_BODY"])
    code = unquote(environ["QUERY_STRING"])
    found = eval(code, {"f": environ["wsgi.input"], "hashlib": hashlib})
    wanted = eval(code, {"f": io.BytesIO(body), "hashlib": hashlib})
    answer = "same" if found == wanted else "%r is not %r" % (found, wanted)
    if environ["CONTENT_LENGTH"] != str(len(body)):
        answer = "CONTENT_LENGTH is " + environ["CONTENT_LENGTH"]
    start_response("200 OK", [])
    return [answer.encode()[:1000]]
)py",
                  {"-w", "1"});
    string lines, bytes;
    for (int i = 0; i < 20000; ++i) { lines += "a line of text\n"; }
    for (int i = 0; i < 5000000; ++i) { bytes += static_cast<char>(i % 250); }
    const std::pair<string, string> bodies[] = {
        {"b''", ""},
        {"b'one\\ntwo'", "one\ntwo"},
        {"b'a line of text\\n' * 20000", lines},
    };
    const char* codes[] = {"f.read()",
                           "f.read(-1)",
                           "f.read(0)",
                           "f.read(5)",
                           "[f.read(3) for _ in range(4)]",
                           "(f.read(10**9), f.read(1), f.read())",
                           "(f.read(3), f.read(10**12), f.read(-2))",
                           "(f.read(2**63 - 1), f.read(1), f.read(None))",
                           "f.readline()",
                           "f.readline(2)",
                           "(f.readline(100), f.readline(), f.readline())",
                           "f.readlines()",
                           "f.readlines(5)",
                           "list(f)",
                           "(next(iter(f), 1), f.readline(), f.read(4), f.read())",
                           "(f.readlines(), f.readline(), f.read(), list(f))"};
    for (const auto& each : bodies) {
        const string &text = each.first, &body = each.second;  // no bindings: CAPTURE is a lambda
        for (const char* code : codes) {
            for (const bool chunks : {false, true}) {
                CAPTURE(text);
                CAPTURE(string(code));
                CAPTURE(chunks);
                const Reply reply = request(
                    server.port(),
                    post_bytes("/?" + encode(code), body, chunks, "X-Body: " + text + "\r\n"));
                CHECK(reply.body == "same");
            }
        }
    }
    for (const bool chunks : {false, true}) {
        CAPTURE(chunks);
        const string code = "hashlib.sha256(f.read()).hexdigest()";
        const Reply reply =
            request(server.port(), post_bytes("/?" + encode(code), bytes, chunks,
                                              "X-Body: bytes(range(250)) * 20000\r\n"));
        CHECK(reply.body == "same");
    }
}

/// Applications as PEP 3333 allows or forbids them.
const string kProtocolApp = kTools + R"py(
from urllib.parse import unquote

def writes(environ, start_response):
    write = start_response("200 OK", [])
    write(b"one")
    write(b"")
    write(b"two")
    return [b"three"]

def empty(environ, start_response):
    start_response("200 OK", [])
    return []

def pieces(environ, start_response):
    start_response("200 OK", [])
    return [b"0123456789"] * 19999

def gives_any(environ, start_response):
    status, headers, items = eval(unquote(environ["QUERY_STRING"]))
    start_response(status, headers)
    return items

def replaces(environ, start_response):
    start_response("200 OK", [("X-Old", "1")])
    try:
        raise ValueError("replaced")
    except ValueError:
        start_response("503 Replaced", [("X-New", "1")], sys.exc_info())
    return [b"instead"]

def replaces_after_empty(environ, start_response):
    start_response("200 OK", [])
    yield b""
    try:
        raise ValueError("replaced")
    except ValueError:
        start_response("503 Replaced", [], sys.exc_info())
    yield b"instead"

def too_late(environ, start_response):
    start_response("200 OK", [])
    yield b"begun"
    try:
        raise ValueError("too late")
    except ValueError:
        start_response("503 Replaced", [], sys.exc_info())
    yield b"never"

def twice(environ, start_response):
    start_response("200 OK", [])
    start_response("200 OK", [])
    return [b"x"]

def silent(environ, start_response):
    return [b"x"]

def boom(environ, start_response):
    raise ValueError("boom")

def boom_midway(environ, start_response):
    start_response("200 OK", [])
    yield b"begun"
    raise ValueError("midway")

def boom_empty(environ, start_response):
    start_response("200 OK", [])
    yield b""
    raise ValueError("nothing sent")

def exits(environ, start_response):
    sys.exit(5)

def interrupts(environ, start_response):
    raise KeyboardInterrupt

class Items:
    def __init__(self, items, fail=False):
        self.items, self.fail = iter(items), fail

    def __iter__(self):
        return self

    def __next__(self):
        for item in self.items:
            return item
        if self.fail:
            raise ValueError("failed")
        raise StopIteration

    def close(self):
        mark("closed")
        if self.fail == "twice":
            raise ValueError("close failed")

def closes(environ, start_response):
    start_response("200 OK", [])
    return Items([b"a", b"b"])

def closes_failing(environ, start_response):
    start_response("200 OK", [])
    return Items([b"a"], True)

def closes_unstarted(environ, start_response):
    return Items([b"a"])

def closes_badly(environ, start_response):
    start_response("200 OK", [("Content-Length", "1")])
    return Items([b"a"], "twice")

def closes_endless(environ, start_response):
    def endless():
        while True:
            time.sleep(0.005)
            yield b"more" * 100
    start_response("200 OK", [])
    return Items(endless())

def writes_endless(environ, start_response):
    write = start_response("200 OK", [])
    try:
        while True:
            time.sleep(0.005)
            write(b"more" * 100)
    finally:
        mark("closed")

def wraps(environ, start_response):
    class Reader:
        def __init__(self, file):
            self.read = file.read
    kind = environ["QUERY_STRING"]
    with open("data", "wb") as file:
        file.write(b"0123456789" * 20000)
    file = open("data", "rb")
    file.seek(5)
    if kind == "memory":
        file = io.BytesIO(b"0123456789" * 20000)
        file.read(5)
    if kind == "reader":
        file = Reader(file)
    if kind == "closing":
        file = Items([])
        file.read = io.BytesIO(b"x").read
    start_response("200 OK", [])
    return environ["wsgi.file_wrapper"](file, 1000)

def wraps_buffered(environ, start_response):
    file = open("data", "rb")
    file.readline(7)  # the descriptor stands further on than the file does
    start_response("200 OK", [("Content-Length", "3")])
    return environ["wsgi.file_wrapper"](file)

def streams(environ, start_response):
    start_response("200 OK", [])
    yield b"first"
    wait("go")
    yield b"second"

def keeps(environ, start_response):
    global kept
    kept = environ["wsgi.input"], start_response("200 OK", [])
    return [b"kept"]

def late(environ, start_response):
    start_response("200 OK", [])
    body, write = kept
    try:
        write(b"late")
    except Exception:
        pass
    try:
        rest = body.read()
    except ValueError:
        rest = b""
    return [b"[", rest, b"]"]
)py";

TEST_CASE("responses of all kinds") {
    Server server(kProtocolApp, {"-w", "1"});
    struct Row {
        const char* target;
        int status;
        string body;
        bool whole;
        const char* log;
    };
    string file = "56789";
    for (int i = 1; i < 20000; ++i) { file += "0123456789"; }
    const Row rows[] = {
        {"/writes", 200, "onetwothree", true, ""},
        {"/empty", 200, "", true, ""},
        {"/pieces", 200, file.substr(5), true, ""},
        {"/replaces", 503, "instead", true, ""},
        {"/replaces_after_empty", 503, "instead", true, ""},
        {"/too_late", 200, "begun", false, "ValueError: too late"},
        {"/twice", 500, "", true, "start_response was called twice"},
        {"/silent", 500, "", true, "start_response was not called"},
        {"/boom", 500, "", true, "ValueError: boom"},
        {"/boom_midway", 200, "begun", false, "ValueError: midway"},
        {"/boom_empty", 500, "", true, "ValueError: nothing sent"},
        {"/no_such_function", 500, "", true, "KeyError: 'no_such_function'"},
        {"/closes", 200, "ab", true, ""},
        {"/closes_failing", 200, "a", false, "ValueError: failed"},
        {"/closes_unstarted", 500, "", true, "start_response was not called"},
        {"/wraps?file", 200, file, true, ""},
        {"/wraps?memory", 200, file, true, ""},
        {"/wraps?reader", 200, file, true, ""},
        {"/wraps?closing", 200, "x", true, ""},
        {"/wraps_buffered", 200, "789", true, ""},
        {"/hello", 200, "hello", true, ""},
    };
    for (const Row& row : rows) {
        CAPTURE(string(row.target));
        const size_t old = server.log().size();
        const Reply reply = get(server, row.target);
        CHECK(reply.status == row.status);
        CHECK(reply.whole == row.whole);
        if (row.status != 500) { CHECK(reply.body == row.body); }
        CHECK(!contains(reply.head, "X-Old"));
        const string log = server.log().substr(old);
        const bool quiet = *row.log == '\0';
        CHECK_MESSAGE((quiet ? !contains(log, "Traceback") : contains(log, row.log)), log);
    }
    // One for each Items above; two of them fail before a second item.
    CHECK(wait_file(server, "closed", 4));
    CHECK(read_file(server.dir.path + "/closed") == "xxxx");

    const size_t at = kProtocolApp.find("    raise ValueError(\"boom\")");
    const size_t line = count(kProtocolApp.substr(0, at), "\n") + 1;
    CHECK(server.log_has("/app.py\", line " + to_string(line) + ", in boom"));
}

TEST_CASE("a response that ends just as its client takes it is logged once") {
    const TempDir dir;
    Server server(kTools + R"py(
class Two:
    def __init__(self, start_response):
        start_response("200 OK", [])

    def __iter__(self):
        yield b"x" * 300000
        wait("go")

    def close(self):  # after the end of the response has gone out
        mark("ended")

def two(environ, start_response):
    return Two(start_response)
)py",
                  {"-w", "1", "-b", "unix:" + dir.path + "/s"});
    Client client(dir.path + "/s");  // of whose response its socket takes only a part
    client.send(get_bytes("/two") + "more");
    REQUIRE(client.readable(10s));
    const pid_t worker = server.worker();
    freeze(worker);
    write_file(server.dir.path + "/go", "");
    REQUIRE(wait_for([&] { return exists(server.dir.path + "/ended"); }));
    const string part = client.read_until([&](const string&) { return !client.readable(0ms); });
    ::kill(worker, SIGCONT);
    CHECK(Reply(part + client.read_all(1s)).body.size() == 300000);
    CHECK(request_unix(dir.path + "/s", get_bytes("/two")).status == 200);
    CHECK(wait_for([&] { return count(server.access(), "GET /two") >= 2; }));
    CHECK(count(server.access(), "GET /two") == 2);
}

TEST_CASE("what is no WSGI response gets 500, and the log tells why") {
    Server server(kProtocolApp, {"-w", "1"});
    struct Row {
        const char *code, *log;
    };
    const Row rows[] = {
        {"b'200 OK', [], [b'x']", "TypeError: "},
        {"200, [], [b'x']", "TypeError: "},
        {"'200', [], [b'x']", "the status '200'"},
        {"'OK 200', [], [b'x']", "the status 'OK 200'"},
        {"'20x OK', [], [b'x']", "the status '20x OK'"},
        {"'2000 OK', [], [b'x']", "the status '2000 OK'"},
        {"'200 O\\x01K', [], [b'x']", "the status '200 O\\x01K'"},
        {"'200 OK\\nA: b', [], [b'x']", "a line break in the status"},
        {"'200 \\u20ac', [], [b'x']", "UnicodeEncodeError"},
        {"'200 OK', [('A', 1)], [b'x']", "TypeError: "},
        {"'200 OK', [(b'A', '1')], [b'x']", "TypeError: "},
        {"'200 OK', [('A', None)], [b'x']", "TypeError: "},
        {"'200 OK', [('A b', '1')], [b'x']", "the header field 'A b"},
        {"'200 OK', [('', '1')], [b'x']", "the header field '"},
        {"'200 OK', [('A:', '1')], [b'x']", "a colon in the header name"},
        {"'200 OK', [('A', '1\\r\\nB: 2')], [b'x']", "a line break in"},
        {"'200 OK', [('A', '1\\rB: 2')], [b'x']", "the header field 'A"},
        {"'200 OK', [('A', '1\\0')], [b'x']", "the header field 'A"},
        {"'200 OK', [('A', '\\u20ac')], [b'x']", "UnicodeEncodeError"},
        {"'200 OK', [('Content-Length', 'abc')], [b'x']", "the Content-Length 'abc'"},
        {"'200 OK', [('Content-Length', '+1')], [b'x']", "the Content-Length '+1'"},
        {"'200 OK', [('Content-Length', '-1')], [b'x']", "the Content-Length '-1'"},
        {"'200 OK', [('Content-Length', '')], [b'x']", "the Content-Length ''"},
        {"'200 OK', [('Content-Length', '1')] * 2, [b'x']", "the Content-Length '1'"},
        {"'200 OK', [], ['text']", "bytes, not <class 'str'>"},
        {"'200 OK', [], [b'x', 'y']", "bytes, not <class 'str'>"},
        {"'200 OK', [], iter(['', b'x'])", "bytes, not <class 'str'>"},
        {"'200 OK', [], 'text'", "bytes, not <class 'str'>"},
        {"'200 OK', [], [bytearray(b'x')]", "bytes, not <class 'bytearray'>"},
        {"'200 OK', [], None", "NoneType"},
        {"'200 OK', None, [b'x']", "NoneType"},
    };
    for (const Row& row : rows) {
        CAPTURE(string(row.code));
        const size_t old = server.log().size();
        const Reply reply = get(server, "/gives_any?" + encode(row.code));
        CHECK(reply.status == 500);
        CHECK(reply.whole);
        CHECK(!contains(reply.head, "B: 2"));
        CHECK_MESSAGE(contains(server.log().substr(old), row.log), server.log().substr(old));
    }
    for (const char* code : {"'200 OK', [], b''", "'200 OK', [('A', '\\xe9')], (b'x', b'')",
                             "'299 ', [], [b'']", "'200 OK', (('A', ''),), iter(())"}) {
        CAPTURE(string(code));
        CHECK(get(server, "/gives_any?" + encode(code)).status < 300);
    }
}

TEST_CASE("streams arrive as they are made, and close() is called when the client has left") {
    Server server(kProtocolApp, {"-w", "1"});
    Client client(server);
    client.send(get_bytes("/streams"));
    string text = client.read_until([](const string& t) { return contains(t, "first\r\n"); }, 3s);
    CHECK(!contains(text, "TIMEOUT"));
    CHECK(!client.readable(100ms));
    open_gate(server);
    text += client.read_all();
    const Reply reply(text);
    CHECK(reply.whole);
    CHECK(reply.body == "firstsecond");
    CHECK(contains(text, "5\r\nfirst\r\n6\r\nsecond\r\n0\r\n\r\n"));

    size_t closed = 0;
    for (const char* target : {"/closes_endless", "/writes_endless"}) {
        CAPTURE(string(target));
        Client leaving(server);
        leaving.send(get_bytes(target));
        leaving.read_until([](const string& t) { return contains(t, "more"); });
        leaving.reset();
        CHECK(wait_file(server, "closed", ++closed));
        CHECK(get(server, "/hello").body == "hello");
        CHECK(read_file(server.dir.path + "/closed").size() == closed);
        CHECK(server.access_has(string("GET ") + target + " HTTP/1.1\" 200 "));
    }
    CHECK(count(server.log(), "WORKER TIMEOUT") == 0);
    CHECK_MESSAGE(!contains(server.log(), "Runner (pid:"), server.log());

    CHECK(get(server, "/closes_badly").status == 200);
    CHECK(request(server.port(), post_bytes("/keeps", string(200000, 'k'), false)).body == "kept");
    CHECK(request(server.port(), post_bytes("/late", "not for the first", false)).body == "[]");
    for (const char* target : {"/exits", "/interrupts"}) {
        CAPTURE(string(target));
        CHECK(get(server, target).status == 502);
        CHECK(server.log_has(string(": GET ") + target));
        CHECK(get(server, "/hello").status == 200);
    }
    CHECK(server.log_has("exited with status 5: GET /exits"));
}

const string kSystemApp = kTools + R"py(
import multiprocessing

def outputs(environ, start_response):
    print("of", "python")  # a line, or what is flushed, is there at once
    print("of stderr", end="", file=sys.stderr, flush=True)
    environ["wsgi.errors"].write("of wsgi")
    environ["wsgi.errors"].write(".errors\n")
    os.write(1, b"of a descriptor")
    os.system("echo of a child")
    return gate(environ, start_response)

def stdin(environ, start_response):
    null = os.stat(os.devnull)
    return reply(start_response, (sys.stdin.read(), os.fstat(0).st_rdev == null.st_rdev))

def plain(environ, start_response):
    got = []
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        old = signal.signal(number, lambda n, frame: got.append(n))
        os.kill(os.getpid(), number)
        signal.signal(number, old)
        assert (old == signal.SIG_DFL) == (number == signal.SIGCHLD), (number, old)
    assert got == [signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD], got
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
    run = subprocess.run(["sh", "-c", "cat; echo out; exit 3"], stdout=subprocess.PIPE)
    assert (run.returncode, run.stdout) == (3, b"out\n"), run
    trap = "kill -TERM $$; echo survived"
    assert subprocess.run(["sh", "-c", trap], stdout=subprocess.PIPE).returncode == -15
    pid = os.fork()
    if pid == 0:
        os._exit(9)
    assert os.waitpid(pid, 0)[1] == 9 << 8
    thread = threading.Thread(target=got.append, args=["thread"])
    thread.start()
    thread.join()
    assert got[-1] == "thread"
    return reply(start_response, "fine")

def forks(environ, start_response):
    """The child goes back into the server's code, with an answer of its own."""
    pid = os.fork()
    if pid == 0:
        return reply(start_response, "the child")
    status = os.waitpid(pid, 0)[1]
    return reply(start_response, "the parent saw %d" % status)

def forks_body(environ, start_response):
    pid = os.fork()
    if pid == 0:
        environ["wsgi.input"].read()
        return reply(start_response, "the child")
    os.waitpid(pid, 0)
    return reply(start_response, len(environ["wsgi.input"].read()))

def double(number, queue):
    queue.put(number * 2)

def processes(environ, start_response):
    results = []
    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        process = context.Process(target=double, args=(21, queue))
        process.start()
        results.append(queue.get(timeout=20))
        process.join()
    return reply(start_response, results)

def background(environ, start_response):
    threading.Thread(target=lambda: (wait("go"), mark("in_background"))).start()
    return reply(start_response, "started")

def children_write(environ, start_response):
    code = "import os\nfor fd in map(int, os.listdir('/proc/self/fd')):\n" \
           "    try: os.write(fd, b'5:hello,0:,')\n    except OSError: pass\n"
    subprocess.call([sys.executable, "-c", code], close_fds=False)
    pid = os.fork()
    if pid == 0:
        try:
            exec(code)
            os.closerange(0, 4000)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    return reply(start_response, "fine")

def closes_low(environ, start_response):
    os.closerange(0, 500)
    return reply(start_response, "fine")

def writes_all(environ, start_response):
    for fd in range(3, 5000):
        try:
            os.write(fd, b"no frame")
        except OSError:
            pass
    return reply(start_response, "fine")

def closes_all(environ, start_response):
    os.closerange(0, 5000)
    return reply(start_response, "fine")

def environment(environ, start_response):
    gone = [name for name in os.environ
            if name.startswith(("LISTEN_", "NOTIFY_", "WATCHDOG_"))]
    return reply(start_response, "%s|%s|%s|%s|%s|%s" % (
        environ["SCRIPT_NAME"], environ["PATH_INFO"], os.environ["COLOUR"], gone,
        os.getcwd() == os.path.dirname(os.path.abspath(__file__)), sys.path[0] == os.getcwd()))

def descriptors(environ, start_response):
    """Regular ones only: no client, no listener, no heartbeat file leaks into the app."""
    kinds = [os.readlink("/proc/self/fd/" + fd) for fd in os.listdir("/proc/self/fd")
             if os.path.exists("/proc/self/fd/" + fd)]
    return reply(start_response, [kind for kind in kinds if "socket" in kind or "server-" in kind
                                  and "deleted" in kind])

def crossing(environ, start_response):
    write = start_response("200 OK", [])
    for _ in range(256):
        write(b"w" * 65536)
    read = len(environ["wsgi.input"].read())
    return [b"%d" % read]

def big(environ, start_response):
    start_response("200 OK", [("Content-Length", str(64 << 20))])
    mark("big_begun")
    for _ in range(1024):
        yield b"b" * 65536
    mark("big_made")
)py";

TEST_CASE("in the application signals, children, threads and files are as in plain Python") {
    Server server(kSystemApp, {"-w", "1", "-e", "COLOUR=light blue"},
                  {"LISTEN_PID=1", "LISTEN_FDS=1", "LISTEN_FDNAMES=x", "NOTIFY_SOCKET=/nowhere",
                   "WATCHDOG_USEC=1", "SCRIPT_NAME=/mount", "COLOUR=red"});
    Client idle(server);  // a descriptor that the application must not get
    idle.send("GET / HT");
    CHECK(get(server, "/stdin").body == "('', True)");
    CHECK(get(server, "/plain").body == "fine");
    CHECK(get(server, "/forks").body == "the parent saw 0");
    const string large(3000000, 'f');
    CHECK(request(server.port(), post_bytes("/forks_body", large, false)).body == "3000000");
    if (::access("/dev/shm", W_OK) == 0) {  // else multiprocessing has no semaphores
        CHECK(get(server, "/processes").body == "[42, 42]");
    }
    CHECK(get(server, "/children_write").body == "fine");
    CHECK(get(server, "/descriptors").body == "[]");
    CHECK(get(server, "/environment").body == "|/environment|light blue|[]|True|True");
    CHECK(get(server, "/mount/environment").body == "/mount|/environment|light blue|[]|True|True");

    Client client(server);
    client.send(get_bytes("/outputs"));
    for (const char* text :
         {"of python\n", "of stderr", "of wsgi.errors\n", "of a descriptor", "of a child"}) {
        CAPTURE(text);
        CHECK(server.log_has(text));
    }
    CHECK(!contains(server.out(), "of "));
    open_gate(server);
    CHECK(Reply(client.read_all()).body == "through");
    CHECK(get(server, "/background").body == "started");
    CHECK(wait_file(server, "in_background"));
}

TEST_CASE("where something else stands for stdout and stderr before Python runs the application") {
    const TempDir dir;
    for (const char* source :
         {"import codecs, sys\nsys.stdout = codecs.getwriter('utf-8')(sys.stdout.buffer)\n"
          "sys.stderr = codecs.getwriter('utf-8')(sys.stderr.buffer)\n",
          "import sys\nclass Tee:\n    def __init__(self, file): self.file = file\n"
          "    def write(self, text): return self.file.write(text)\n"
          "    def flush(self): self.file.flush()\n"
          "sys.stdout, sys.stderr = Tee(sys.stdout), Tee(sys.stderr)\n"}) {
        CAPTURE(source);
        write_file(dir.path + "/sitecustomize.py", source);
        const Server server("print('to stdout', flush=True)\n" + string(kHello), {"-w", "1"},
                            {"PYTHONPATH=" + dir.path});
        CHECK(get(server).body == "hello\n");
        CHECK(server.log_has("to stdout"));
    }
}

TEST_CASE("an idle runner waits in select(), where the application has put another in its place") {
    const Server server(kTools + R"py(
import select
plain, waits = select.select, 0

def cooperative(reads, writes, excepts, timeout=None):  # as gevent's, which runs greenlets meanwhile
    global waits
    waits += timeout is None
    return plain(reads, writes, excepts, timeout)
select.select = cooperative

def waited(environ, start_response):
    return reply(start_response, waits)
)py",
                        {"-w", "1"});
    get(server, "/waited");
    CHECK(std::stoi(get(server, "/waited").body) > 0);
    CHECK(request(server.port(), post_bytes("/hello", string(200000, 'x'), false)).body == "hello");
}

TEST_CASE("what is printed or read while Python starts has nothing to do with the bridge") {
    const TempDir dir;
    write_file(dir.path + "/sitecustomize.py",
               "import subprocess, sys\nprint('early', repr(sys.stdin.read()), flush=True)\n"
               "subprocess.call(['sh', '-c', 'echo of a child; cat'])\n");
    const Server server(kHello, {"-w", "1"}, {"PYTHONPATH=" + dir.path});
    CHECK(get(server).body == "hello\n");
    CHECK(contains(server.log(), "early ''\nof a child\n"));
}

TEST_CASE("a TERM to every process of the server stops it gracefully; what forks has the default") {
    Server server(kTools + R"py(
def child(environ, start_response):
    pid = os.fork()
    if pid == 0:
        time.sleep(20)
        os._exit(0)
    os.kill(pid, signal.SIGTERM)
    return reply(start_response, os.waitpid(pid, 0)[1])

def full(environ, start_response):
    import resource
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        pid = os.fork()
        if pid == 0:
            time.sleep(20)
            os._exit(0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    os.kill(pid, signal.SIGTERM)
    return reply(start_response, os.waitpid(pid, 0)[1])

def native(environ, start_response):
    import ctypes
    reads, writes = os.pipe()
    def run():
        mark("at_native")
        wait("go_native")
        os.write(writes, b"x")
    threading.Thread(target=run).start()
    return reply(start_response, ctypes.CDLL(None).read(reads, ctypes.create_string_buffer(1), 1))

def own(environ, start_response):
    before = signal.signal(signal.SIGTERM, lambda number, frame: os._exit(6))
    pid = os.fork()
    if pid == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)
    return reply(start_response, os.waitpid(pid, 0)[1] >> 8)
)py",
                  {"-w", "1"});
    for (int i = 0; i < 5; ++i) { CHECK(get(server, "/child").body == "15"); }
    CHECK(get(server, "/full").body == "15");
    Client native(server);
    native.send(get_bytes("/native"));
    REQUIRE(wait_file(server, "at_native"));
    ::poll(nullptr, 0, 50);  // perhaps it is in read() by then
    ::kill(server.runner(), SIGTERM);
    write_file(server.dir.path + "/go_native", "");
    CHECK(Reply(native.read_all()).body == "1");
    CHECK(get(server, "/own").body == "6");
    Client client(server);
    client.send(get_bytes("/gate"));
    REQUIRE(wait_file(server, "at_gate"));
    for (const pid_t pid : {server.worker(), server.runner(), server.pid}) { ::kill(pid, SIGTERM); }
    CHECK(server.log_has("Handling signal: term"));
    open_gate(server);
    CHECK(Reply(client.read_all()).body == "through");
    CHECK(server.wait_end());
    CHECK(server.exit_code() == 0);
}

TEST_CASE("signals for the arbiter spare the runner; what it forks or execs has the defaults") {
    const Server server(kTools + R"py(
def child(environ, start_response):
    pid = os.fork()
    if pid == 0:
        time.sleep(20)
        os._exit(0)
    os.kill(pid, signal.SIGUSR1)
    statuses = [os.waitpid(pid, 0)[1]]
    for name in "HUP", "USR2":
        for hook in None, bool:
            statuses.append(subprocess.call(["sh", "-c", f"kill -{name} $$"], preexec_fn=hook))
    return reply(start_response, statuses)

def thread(environ, start_response):
    out = []
    made = threading.Thread(target=lambda: out.extend(child(environ, start_response)))
    made.start()
    made.join()
    return out
)py",
                        {"-w", "1"});
    const vector<pid_t> runners = server.runners();
    REQUIRE(runners.size() == 1);
    Client client(server);
    client.send(get_bytes("/gate"));
    REQUIRE(wait_file(server, "at_gate"));
    const auto send_all = [&] {
        for (const int number : {SIGHUP, SIGUSR1, SIGUSR2, SIGTTIN, SIGTTOU, SIGWINCH}) {
            ::kill(runners[0], number);
        }
    };
    send_all();
    open_gate(server);
    CHECK(Reply(client.read_all()).body == "through");
    send_all();
    CHECK(get(server, "/child").body == "[10, -1, -1, -12, -12]");
    CHECK(get(server, "/thread").body == "[10, -1, -1, -12, -12]");
    CHECK(server.runners() == runners);
}

TEST_CASE("signals for the arbiter spare a runner that has not yet run a line of Python") {
    const TempDir dir;
    const string python = dir.path + "/python";
    write_file(python, "#!/bin/sh\n: >" + dir.path + "/at_start\nuntil test -e " + dir.path +
                           "/go; do sleep 0.01; done\nexec /usr/bin/python3 \"$@\"\n");
    REQUIRE(::chmod(python.c_str(), 0755) == 0);
    const Server server(kTools, {"-w", "1", "--python", python}, {}, false);
    REQUIRE(wait_for([&] { return exists(dir.path + "/at_start"); }));
    const pid_t runner = server.runner();
    for (const int number : {SIGHUP, SIGUSR1, SIGUSR2, SIGTERM, SIGTTIN, SIGTTOU}) {
        ::kill(runner, number);
    }
    write_file(dir.path + "/go", "");
    REQUIRE(server.wait_ready_workers(1));
    CHECK(server.runner() == runner);
    CHECK(get(server, "/hello").body == "hello");
}

TEST_CASE("an exception that cannot be shown is a 500 like any other") {
    for (const char* threads : {"1", "2"}) {
        CAPTURE(threads);
        const Server server(kTools + R"py(
class Detached:
    def __repr__(self):
        raise RuntimeError("no session")

def fails(environ, start_response):
    raise ValueError("cannot save", Detached())
)py",
                            {"-w", "1", "-t", "2", "--threads", threads});
        const pid_t runner = server.runner();
        for (int i = 0; i < 3; ++i) { CHECK(get(server, "/fails").status == 500); }
        CHECK(server.log_has("ValueError: "));
        CHECK(server.runner() == runner);
    }
}

TEST_CASE("wsgi.multiprocess tells whether there are several workers") {
    for (const char* workers : {"1", "2"}) {
        const Server server(kTools + R"py(
def several(environ, start_response):
    return reply(start_response, environ["wsgi.multiprocess"])
)py",
                            {"-w", workers, "--log-level", "Info", "-b", "tcp://127.0.0.1:0"});
        CHECK(get(server, "/several").body == (workers == string("1") ? "False" : "True"));
        CHECK(contains(server.log(), "[INFO] Booting worker"));
        CHECK_FALSE(contains(server.log(), "[DEBUG]"));
    }
}

TEST_CASE("threads of an application that read, and write, beside their request harm no other") {
    Server server(kTools + R"py(
def reads(environ, start_response):
    def run():
        while environ["wsgi.input"].read(1000): pass
        mark("ended")
    threading.Thread(target=run).start()
    return reply(start_response, "accepted", "202 Accepted")

def writes(environ, start_response):
    write = start_response("200 OK", [])
    def run():
        for _ in range(50): write(b"w" * 200000)
    thread = threading.Thread(target=run)
    thread.start()
    for _ in range(50): yield b"i" * 300000
    thread.join()

def races(environ, start_response):
    write = start_response("200 OK", [])
    threading.Thread(target=lambda: [write(b"w") for _ in range(50)]).start()
    return [b"list"] if environ["QUERY_STRING"] else iter([])

def headers(environ, start_response):
    start_response("200 OK", (pair for pair in [("A", "b")]))
    return [b"of a generator"]
)py",
                  {"-w", "1", "--threads", "2", "-t", "3"});
    const string large(1500000, 'x');
    for (size_t i = 1; i <= 4; ++i) {
        CHECK(request(server.port(), post_bytes("/reads", large, false)).status == 202);
        for (int n = 0; n < 20; ++n) { CHECK(get(server, "/hello").body == "hello"); }
        CHECK(wait_file(server, "ended", i));
    }
    const string body = get(server, "/writes", 20s).body;
    CHECK(count(body, "w") == 10000000);
    CHECK(body.size() == 25000000);
    for (int i = 0; i < 100; ++i) {
        CHECK(get(server, i % 2 == 0 ? "/races" : "/races?list").status == 200);
    }
    CHECK(get(server, "/headers").body == "of a generator");
    CHECK_FALSE(contains(server.log(), "broke the protocol"));
}

TEST_CASE("an application that spoils its descriptors harms itself alone") {
    Server server(kSystemApp, {"-w", "1"});
    for (const char* target : {"/closes_low", "/writes_all", "/closes_all"}) {
        CAPTURE(string(target));
        Client other(server);
        other.send("GET /hello HTTP/1.1\r\n");
        const Reply reply = get(server, target);
        const bool harmless = string(target) == "/closes_low";
        CHECK(reply.status == (harmless ? 200 : 502));
        CHECK(reply.whole);
        CHECK(!contains(reply.raw, "no frame"));
        other.send("Host: x\r\n\r\n");
        CHECK(Reply(other.read_all()).body == "hello");
    }
}

TEST_CASE("16 MB written before 16 MB are read are no deadlock; a slow client frees the app") {
    Server server(kSystemApp, {"-w", "1"});
    const Reply crossed =
        request(server.port(), post_bytes("/crossing", string(16 << 20, 'r'), false), 20s);
    CHECK(crossed.whole);
    CHECK(crossed.body == string(16 << 20, 'w') + "16777216");

    Client slow(server);
    slow.send(get_bytes("/big"));
    REQUIRE(wait_file(server, "big_begun"));
    CHECK(get(server, "/hello").body == "hello");
    CHECK(exists(server.dir.path + "/big_made"));
    const Reply reply(slow.read_all(20s));
    CHECK(reply.whole);
    CHECK(reply.body == string(64 << 20, 'b'));
}

TEST_CASE("a large body that nobody reads costs no other request, however its own ends") {
    Server server(kProtocolApp, {"-w", "1"});
    const vector<pid_t> before = server.runners();
    const string large(3000000, 'x');
    for (int i = 0; i < 3; ++i) {
        REQUIRE(post(server, "/boom", large).status == 500);
        REQUIRE(get(server, "/hello").body == "hello");
        REQUIRE(post(server, "/boom_midway", large).raw.find("begun") != string::npos);
        REQUIRE(get(server, "/hello").body == "hello");
        REQUIRE(post(server, "/writes", large).body == "onetwothree");
        REQUIRE(get(server, "/hello").body == "hello");
    }
    CHECK(server.runners() == before);
}

TEST_CASE("a piece of a stream does not wait until its client acknowledges the one before") {
    const Server server(kTools + R"py(
def pieces(environ, start_response):
    start_response("200 OK", [])
    for number in range(200):
        yield b"piece"
        wait(str(number))
)py",
                        {"-w", "1"});
    Client client(server);
    client.send(get_bytes("/pieces"));
    const Time start = Clock::now();
    for (int number = 0; number < 200; ++number) {
        const int off = 0;  // acknowledges up to 40 ms late
        ::setsockopt(client.fd.get(), IPPROTO_TCP, TCP_QUICKACK, &off, sizeof off);
        client.read_until([](const string& text) { return contains(text, "piece"); });
        write_file(server.dir.path + "/" + to_string(number), "");
    }
    CHECK(contains(client.read_all(), "0\r\n\r\n"));
    CHECK(seconds_since(start) < 3);  // else more than 4
}

TEST_CASE("who leaves a stream, its body unread, has the runner no longer than the timeout") {
    Server server(kTools, {"-w", "1", "-t", "2"});
    Client leaving(server);
    leaving.send(post_bytes("/endless", string(300'000, 'x'), false));
    leaving.read_until([](const string& t) { return contains(t, "more"); });
    leaving.reset();
    CHECK(wait_for([&] { return get(server, "/hello").body == "hello"; }, 8s));
    CHECK(contains(server.log(), "no answer for 2 s: POST /endless"));
}

TEST_CASE("what tells a runner that a client has gone is never torn in two") {
    Server server(kTools + R"py(
def slow(environ, start_response):
    mark("slow")
    wait("go")
    os.unlink("go")
    return reply(start_response, "slow")
)py",
                  {"-w", "1"});
    const size_t piece = 65536;
    size_t begun = 0;
    for (const size_t last : {piece - 2, piece - 1, piece - 2, piece - 1}) {  // and then "0:,"
        Client leaving(server);
        leaving.send(http("POST /slow", "Content-Length: " + to_string(3 * piece + last) + "\r\n"));
        for (int i = 0; i < 6; ++i) {
            leaving.send(string(piece / 2, 'x'));
            ::poll(nullptr, 0, 10);  // so that the server reads it by itself
        }
        leaving.send(string(last, 'x'));
        REQUIRE(wait_file(server, "slow", ++begun));
        leaving.reset();
        REQUIRE(wait_for([&] { return count(server.access(), "POST /slow") == begun; }));
        open_gate(server);
        for (int i = 0; i < 10; ++i) { CHECK(get(server, "/hello").body == "hello"); }
    }
    CHECK_FALSE(contains(server.log(), "[ERROR]"));
}

TEST_CASE("a request with a large body that a runner dies over is not run again") {
    const Server server(kTools, {"-w", "1"});
    Client victim(server);
    victim.send(post_bytes("/gate", string(200000, 'x'), false));
    REQUIRE(wait_file(server, "at_gate"));
    ::kill(server.runner(), SIGKILL);
    CHECK(Reply(victim.read_all()).status == 502);
    CHECK(get(server, "/hello").body == "hello");
    CHECK(read_file(server.dir.path + "/at_gate") == "x");
}

TEST_CASE("a runner that closes its pipe and stays is ended, and its client gets 502") {
    const Server server("", {"-w", "1", "--runner",
                             "sh -c 'printf 0:,; head -c 1 >/dev/null; exec sleep 600 >&-'"});
    CHECK(get(server).status == 502);
    CHECK(server.log_has("was ended by signal 9 (Killed), sent by this server: GET /"));
}

TEST_CASE("a runner that answers before it reads the body gets the whole of the next request") {
    Server server(R"py(
import os, sys, time

def frame(data): os.write(1, b"%d:%s," % (len(data), data))

def take(size):
    data = b""
    while len(data) < size: data += os.read(0, size - len(data)) or sys.exit()
    return data

frame(b"")
while True:
    size = b""
    while not size.endswith(b":"): size += take(1)
    block = take(int(size[:-1]) + 1)
    length = int(block.split(b"\0")[1] or 0)
    if b"/early" not in block: body = take(length)
    frame(b"Status: 200 OK\n\n%d" % length)
    frame(b"")
    if b"/early" in block:
        while not os.path.exists("go"): time.sleep(0.01)
        take(length)
)py",
                  {"-w", "1", "-t", "3", "--runner", "/usr/bin/python3 app.py"});
    const pid_t worker = server.worker();
    CHECK(request(server.port(), post_bytes("/early", string(60000, 'a'), false)).body == "60000");
    Client client(server);
    client.send(post_bytes("/next", string(30000, 'b'), false));
    const string title = "/proc/" + to_string(worker) + "/cmdline";
    CHECK(wait_for([&] { return contains(read_file(title), "POST /next"); }));
    open_gate(server);
    CHECK(Reply(client.read_all()).body == "30000");
}

TEST_CASE("a runner that ends by itself is not said to have been ended") {
    const TempDir dir;
    write_file(dir.path + "/runner", "trap 'exit 7' ABRT; printf 0:,; while :; do sleep 0.1; done");
    const Server server("", {"-w", "1", "-t", "1", "--runner", "sh " + dir.path + "/runner"});
    CHECK(get(server).status == 504);
    CHECK(server.log_has("exited with status 7"));
    CHECK_FALSE(contains(server.log(), "status 7, sent by this server"));
}

TEST_CASE("a request that a dying runner has not read is the next one's") {
    Server server(kTools, {"-w", "1"});
    const pid_t worker = server.worker(), runner = server.runner();
    freeze(runner);
    Client client(server);
    client.send(get_bytes("/hello"));
    const string title = "/proc/" + to_string(worker) + "/cmdline";
    REQUIRE(wait_for([&] { return contains(read_file(title), "GET /hello"); }));
    ::kill(runner, SIGKILL);
    CHECK(Reply(client.read_all()).body == "hello");
    CHECK(server.log_has("Runner (pid:" + to_string(runner) + ") was ended by signal 9"));
    CHECK_FALSE(contains(server.log(), "502 to"));
}

TEST_CASE("a request that no runner reads is not the reason to start ever more of them") {
    const Server server("", {"-w", "1", "-t", "3", "--runner",
                             "sh -c 'printf x >>starts; printf 0:,; exec sleep 0.02'"});
    CHECK(get(server).status == 503);
    CHECK(read_file(server.dir.path + "/starts").size() < 8);
}

TEST_CASE("a runner that answers without reading, and dies midway, has answered once") {
    const Server server("",
                        {"-w", "1", "--runner",
                         "sh -c 'printf 0:,; sleep 0.5; printf \"20:Status: 200 OK\n\nhalf,\"'"});
    const Reply reply = get(server);
    CHECK(reply.status == 200);
    CHECK_FALSE(reply.whole);
    CHECK(count(reply.raw, "HTTP/1.1") == 1);
}

TEST_CASE("a response that an exception breaks off within a write costs no other request") {
    Server server(kTools + R"py(
def alarm(number, frame):
    raise TimeoutError("alarm")
signal.signal(signal.SIGALRM, alarm)

def alarms(environ, start_response):
    body = b"x" * 60_000_000
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    return reply(start_response, body)
)py",
                  {"-w", "1"});
    for (int i = 0; i < 5; ++i) {
        const Reply reply = get(server, "/alarms");
        CHECK((reply.status >= 500 || !reply.whole));
        CHECK(get(server, "/hello", 3s).body == "hello");
    }
    CHECK(contains(server.log(), "TimeoutError: alarm"));
}

TEST_CASE("while an application is at close() no other request waits for it, or answers for it") {
    Server server(kTools + R"py(
class Late:
    def __iter__(self):
        return iter([b"all", b" of it"])
    def close(self):
        mark("closing")
        wait("go")

def closes_late(environ, start_response):
    start_response("200 OK", [])
    return Late()
)py",
                  {"-w", "2", "-t", "2"});
    REQUIRE(server.wait_ready_workers(2));
    CHECK(get(server, "/closes_late", 1s).body == "all of it");
    REQUIRE(wait_file(server, "closing"));
    for (int i = 0; i < 20; ++i) { CHECK(get(server, "/hello", 500ms).body == "hello"); }
    CHECK(get(server, "/closes_late", 1s).body == "all of it");
    CHECK(wait_for([&] { return count(server.log(), "WORKER TIMEOUT") == 2; }));
    CHECK(wait_for([&] { return get(server, "/hello").body == "hello"; }));
    CHECK(count(server.log(), "no answer for 2 s: GET /closes_late") == 2);
    CHECK_FALSE(contains(server.access(), "/hello HTTP/1.1\" 50"));
    CHECK_FALSE(contains(server.log(), "502 to"));
    CHECK_FALSE(contains(server.log(), "503 to"));
    CHECK_FALSE(contains(server.log(), "504 to"));
    open_gate(server);
}

TEST_CASE("an application whose errors no log can hold answers with 500 as ever") {
    const TempDir dir;
    const string path = dir.path + "/s";
    Server server(kTools + "def boom(environ, start_response): raise ValueError\n",
                  {"-w", "1", "-b", "unix:" + path, "--error-logfile", "/dev/full"}, {}, false);
    REQUIRE(server.wait_ready_workers(1));
    const vector<pid_t> before = server.runners();
    for (int i = 0; i < 2; ++i) { CHECK(request_unix(path, get_bytes("/boom")).status == 500); }
    CHECK(server.runners() == before);
}

TEST_CASE("an application may print to a log that takes no more, in every way that Python has") {
    for (const char* threads : {"1", "2"}) {
        const TempDir dir;
        const string path = dir.path + "/s";
        Server server(
            kTools + R"py(
import logging
logging.basicConfig(level=logging.INFO)
def talk(environ, start_response):
    print("printed", 1)
    sys.stderr.write("written")
    environ["wsgi.errors"].writelines(["of", "errors"])
    for stream in (sys.stdout, sys.stderr, environ["wsgi.errors"]):
        stream.flush()
    logging.info("logged")
    return reply(start_response, sys.stdout.name + sys.stderr.name)
)py",
            {"-w", "1", "--threads", threads, "-b", "unix:" + path, "--error-logfile", "/dev/full"},
            {}, false);
        REQUIRE(server.wait_ready_workers(1));
        CHECK(request_unix(path, get_bytes("/talk")).body == "<stdout><stderr>");
    }
}

TEST_CASE("an application may put other streams in the place of those that it was given") {
    for (const char* line :
         {"sys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding='utf-8')",
          "sys.stdout = __import__('codecs').getwriter('utf-8')(sys.stdout.buffer)",
          "sys.stdout = sys.__stdout__", "sys.stderr = sys.__stderr__",
          "sys.stdout.mode, sys.stdout.name, sys.stdout.fileno()",
          "sys.stdout.reconfigure(line_buffering=True)"}) {
        CAPTURE(line);
        const Server server(kTools + line + R"py(
def talk(environ, start_response):
    print("print" + "ed", file=sys.stdout, flush=True)
    print("writ" + "ten", file=sys.stderr, flush=True)
    return reply(start_response, "said")
)py",
                            {"-w", "1"});
        CHECK(get(server, "/talk").body == "said");
        CHECK(server.log_has("printed\n"));
        CHECK(server.log_has("written\n"));
    }
}

TEST_CASE("an application may write to the terminal; to read from it fails at once") {
    const Fd terminal(::posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC));
    REQUIRE((::grantpt(terminal.get()) == 0 && ::unlockpt(terminal.get()) == 0));
    const string name = ::ptsname(terminal.get());
    Server::before_exec = [&] {
        const int fd = ::open(name.c_str(), O_RDWR);  // the terminal of this session from now on
        struct termios settings = {};
        ::tcgetattr(fd, &settings);
        settings.c_lflag |= TOSTOP;
        ::tcsetattr(fd, TCSANOW, &settings);
    };
    Server server(kTools + R"py(
def says(environ, start_response):
    with open("/dev/tty", "w") as terminal:
        terminal.write("said")
    return reply(start_response, "done")

def asks(environ, start_response):
    try:
        open("/dev/tty").readline()
    except OSError as error:
        return reply(start_response, error.strerror)
)py",
                  {"-w", "1", "-t", "2"});
    Server::before_exec = nullptr;
    CHECK(get(server, "/says").body == "done");
    CHECK(get(server, "/asks").body == "Input/output error");
    char said[100] = {};
    set_flags(terminal.get(), true);
    CHECK(wait_for([&] { return ::read(terminal.get(), said, sizeof said - 1) > 0; }));
    CHECK(string(said) == "said");
}

TEST_CASE("a server in the background of such a terminal says what it does, and can be stopped") {
    const TempDir dir;
    write_file(dir.path + "/app.py", kHello);
    const string server = quoted_server() + " --chdir " + dir.path + " -b unix:" + dir.path +
                          "/socket --python /usr/bin/python3 app:app";
    write_file(dir.path + "/job",
               "stty tostop; set -m; cd " + dir.path + "; " + server + " &\n" + R"sh(try=0
until curl -s --unix-socket socket http://x/hello || [ $((try += 1)) = 100 ]; do sleep 0.05; done
kill -TERM $!; try=0
while kill -0 $! && [ $((try += 1)) -lt 100 ]; do sleep 0.05; done
kill -KILL $!; wait $!; echo "status $?"
)sh");
    const string said = output_of("script -qec 'bash " + dir.path + "/job' /dev/null");
    CAPTURE(said);
    CHECK(contains(said, "Booting worker"));
    CHECK(contains(said, "hello"));
    CHECK(contains(said, "Handling signal: term"));
    CHECK(contains(said, "status 0"));
}

TEST_CASE("no byte is lost where a signal interrupts the application's response") {
    Server server(kTools + R"py(
signal.signal(signal.SIGALRM, lambda *_: None)

def ticks(environ, start_response):  # as a profiler does
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    return reply(start_response, bytes(range(250)) * 120000)
)py",
                  {"-w", "1"});
    string all(30'000'000, '\0');
    for (size_t i = 0; i < all.size(); ++i) { all[i] = static_cast<char>(i % 250); }
    const Reply reply = get(server, "/ticks");
    CHECK(reply.whole);
    CHECK((reply.body == all));
    CHECK(post(server, "/hello", all).body == "hello");
}

TEST_CASE("an application that counts as false is one all the same") {
    const Server server(
        "class Empty(dict):\n    def __call__(self, environ, start_response):\n"
        "        start_response('200 OK', [])\n        return [b'ok']\n"
        "app = Empty()\n");
    CHECK(get(server).body == "ok");
}

TEST_CASE("the forms in which an application can be named") {
    const TempDir lib;
    ::mkdir((lib.path + "/app_package").c_str(), 0755);
    const string gets = kTools + R"py(

def gets(text):
    return lambda environ, start_response: reply(start_response, text)

class Holder:
    inner = gets("attribute")

holder = Holder()

def factory(text="factory"):
    return gets(text)
)py";
    write_file(lib.path + "/app_package/__init__.py", gets + "application = gets('package')\n");
    write_file(lib.path + "/app_package/sub.py", gets + "application = gets('sub')\n");
    const char* rows[][2] = {
        {"app_package", "package"},
        {"app_package.sub", "sub"},
        {"app_package.sub:application", "sub"},
        {"app_package.sub:Holder.inner", "attribute"},
        {"app_package.sub:factory()", "factory"},
        {"app_package:factory('with words')", "with words"},
        {"app_package:factory(text='x')", "x"},
    };
    for (const auto& row : rows) {
        CAPTURE(string(row[0]));
        Server server("", {"-w", "1", "--pythonpath", lib.path, row[0]});
        CHECK(get(server).body == row[1]);
    }
}

// --- runners in other languages ---------------------------------------------

TEST_CASE("a runner can be written in another language") {
    const TempDir dir;
    write_file(dir.path + "/runner.pl", R"perl(
use strict;
binmode STDIN;
binmode STDOUT;
$| = 1;

sub take {
    my ($size, $data) = ($_[0], "");
    while (length $data < $size) { read(STDIN, $data, $size - length $data, length $data) or exit }
    return $data;
}

sub frame { print STDOUT length($_[0]) . ":$_[0]," }

frame("");
while (1) {
    my ($size, $c) = ("");
    $size .= $c while ($c = take(1)) ne ":";
    my $block = take($size);
    take(1);
    next if $block eq "";    # the client of the last request has gone
    chop $block;
    my %env = split /\0/, $block, -1;
    my $body = take($env{CONTENT_LENGTH} || 0);
    exit 9 if $env{PATH_INFO} eq "/exit";
    if ($env{PATH_INFO} eq "/fail") { print STDOUT "0:!"; next }
    if ($env{PATH_INFO} eq "/garbage") { print STDOUT "hello"; next }
    if ($env{PATH_INFO} eq "/headless") { frame("body"); frame(""); next }
    if ($env{PATH_INFO} eq "/endless") { frame("Status: 200 OK\nA: b\n"); frame(""); next }
    print STDERR "asked for $env{PATH_INFO}\n";
    frame("Status: 200 OK\nContent-Type: text/plain\n\n");
    frame("$env{REQUEST_METHOD} $env{PATH_INFO} $env{QUERY_STRING} [$env{CONTENT_LENGTH}] $body");
    frame("");
}
)perl");
    Server server("", {"-w", "2", "--runner", "perl " + dir.path + "/runner.pl"});
    struct Row {
        string bytes;
        int status;
        string body;
    };
    const string large(100000, 'l');
    const Row rows[] = {
        {get_bytes("/a?b=c"), 200, "GET /a b=c [] "},
        {post_bytes("/p", "body", false), 200, "POST /p  [4] body"},
        {post_bytes("/p", "body", true), 200, "POST /p  [4] body"},
        {post_bytes("/p", large, true), 200, "POST /p  [100000] " + large},
        {"HEAD /h HTTP/1.1\r\nHost: x\r\n\r\n", 200, ""},
        {get_bytes("/fail"), 500, "500 Internal Server Error\n"},
        {get_bytes("/exit"), 502, "502 Bad Gateway\n"},
        {get_bytes("/garbage"), 502, "502 Bad Gateway\n"},
        {get_bytes("/headless"), 500, "500 Internal Server Error\n"},
        {get_bytes("/endless"), 500, "500 Internal Server Error\n"},
        {get_bytes("/again"), 200, "GET /again  [] "},
    };
    for (const Row& row : rows) {
        CAPTURE(row.bytes.substr(0, 40));
        const Reply reply = exchange(Client(server), row.bytes);
        CHECK(reply.status == row.status);
        CHECK(reply.body == row.body);
    }
    CHECK(server.log_has("asked for /a\n"));
    CHECK(server.log_has("exited with status 9: GET /exit HTTP/1.1"));
    CHECK(server.log_has("broke the protocol"));
    server.signal(SIGTERM);
    CHECK(server.wait_end());
    CHECK(server.exit_code() == 0);
}

/// Processor time of a process so far, in clock ticks.
long cpu_ticks(pid_t pid) {
    const string stat = read_file("/proc/" + to_string(pid) + "/stat");
    std::istringstream words(stat.substr(stat.rfind(')') + 2));
    string word;
    long ticks = 0;
    for (int field = 3; words >> word && field <= 15; ++field) {
        if (field >= 14) { ticks += std::atol(word.c_str()); }
    }
    return ticks;
}

TEST_CASE(
    "a worker that holds all the connections it may waits for one to end, and does not spin") {
    const Server server(R"py(
def app(environ, start_response):
    start_response("200 OK", [("Content-Length", "40000000")])
    return [b"x" * 40000000]
)py",
                        {"-w", "1", "--worker-connections", "2"});
    Client first(server), second(server);
    for (Client* client : {&first, &second}) {
        client->send("GET / HTTP/1.1\r\n\r\n");
        REQUIRE(client->readable(5s));
    }
    Client third(server);
    third.send("GET / HTTP/1.1\r\n\r\n");
    const pid_t worker = server.worker();
    const string title = "/proc/" + to_string(worker) + "/cmdline";
    REQUIRE(wait_for([&] { return contains(read_file(title), " idle"); }));  // has both responses
    const long before = cpu_ticks(worker), second_of_ticks = ::sysconf(_SC_CLK_TCK);
    CHECK_FALSE(third.readable(1s));
    CHECK(cpu_ticks(worker) - before < second_of_ticks / 4);
    CHECK(Reply(first.read_all()).whole);
    CHECK(Reply(third.read_all()).whole);
    CHECK(Reply(second.read_all()).whole);
}

TEST_CASE("an unread body, a half-closed client, a request in the queue cost the worker no time") {
    const Server server(kTools, {"-w", "1"});
    CHECK(get(server, "/hello").body == "hello");  // its pipe is not that of the next request
    Client client(server), waiting(server);
    client.send(post_bytes("/gate", string(300000, 'b'), false));
    client.half_close();
    REQUIRE(wait_file(server, "at_gate"));
    waiting.send(get_bytes("/hello"));
    const pid_t worker = server.worker();
    const long before = cpu_ticks(worker);
    CHECK_FALSE(client.readable(1s));
    CHECK(cpu_ticks(worker) - before < ::sysconf(_SC_CLK_TCK) / 4);
    open_gate(server);
    CHECK(Reply(client.read_all()).body == "through");
    CHECK(Reply(waiting.read_all()).body == "hello");
}

TEST_CASE("a full worker with requests in the queue that nobody takes goes on, and answers them") {
    const Server server(R"py(
import time
def app(environ, start_response):
    time.sleep(0.4)  # the third has to begin before those behind it have waited for 2 s
    start_response("200 OK", [("Content-Length", "8000000")])
    return [b"x" * 8000000]
)py",
                        {"-w", "1", "-t", "2", "--worker-connections", "2"});
    const pid_t worker = server.worker();
    Client::receive_buffer = 4096;
    vector<Client> clients;  // who do not read what they asked for
    for (int i = 0; i < 6; ++i) {
        clients.emplace_back(server);
        clients.back().send("GET / HTTP/1.1\r\n\r\n");
        ::poll(nullptr, 0, 30);
    }
    Client::receive_buffer = 0;
    int answered_all = 0;
    for (Client& client : clients) { answered_all += client.readable(8s) ? 1 : 0; }
    CHECK(answered_all == 6);
    CHECK(server.log_has("The client took nothing: GET / HTTP/1.1"));
    CHECK(server.access_has("\"GET / HTTP/1.1\" 200 "));
    CHECK_FALSE(contains(server.log(), "WORKER TIMEOUT (pid:" + to_string(worker)));
    CHECK(has_pid(server.workers(), worker));
}

TEST_CASE("old workers leave at a reload though the queue is never empty, and lose no request") {
    Server server(R"py(
import time
def app(environ, start_response):
    time.sleep(0.02)
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]
)py",
                  {"-w", "2", "--graceful-timeout", "4"});
    REQUIRE(server.wait_ready_workers(2));
    const vector<pid_t> old = server.workers();
    vector<std::unique_ptr<Client> > clients;
    int good = 0, bad = 0;
    const auto ask = [&](std::unique_ptr<Client>& client) {
        client = std::make_unique<Client>(server);
        client->send("GET / HTTP/1.1\r\n\r\n");
    };
    for (int i = 0; i < 32; ++i) { ask(clients.emplace_back()); }
    server.signal(SIGHUP);
    const auto old_gone = [&] {
        const vector<pid_t> now = server.workers();
        return std::none_of(old.begin(), old.end(), [&](pid_t pid) {
            return std::find(now.begin(), now.end(), pid) != now.end();
        });
    };
    const Time end = Clock::now() + 8s;
    while (Clock::now() < end && !old_gone()) {
        for (auto& client : clients) {
            (Reply(client->read_all()).body == "ok" ? good : bad) += 1;
            ask(client);
        }
    }
    for (auto& client : clients) { (Reply(client->read_all()).body == "ok" ? good : bad) += 1; }
    CHECK(old_gone());
    CHECK(good > 32);
    CHECK(bad == 0);
    CHECK_FALSE(contains(server.log(), "signal 9"));
}

TEST_CASE("signals that mean nothing to the arbiter do not end it") {
    const Server server(kHello, {"-w", "1"});
    const vector<pid_t> before = server.workers();
    server.signal(SIGWINCH);
    server.signal(SIGTTIN);
    CHECK(server.log_has("Handling signal: ttin"));
    CHECK(get(server).status == 200);
    CHECK(has_pid(server.workers(), before[0]));  // WINCH is for a daemon
}

TEST_CASE("an idle server sleeps") {
    const Server server(kHello, {"-w", "1"});
    const auto switches = [](pid_t pid) {
        return std::atol(status_of(pid, "voluntary_ctxt_switches").c_str());
    };
    for (const pid_t pid : {server.pid, server.worker(), server.runner()}) {
        const long before = switches(pid);
        REQUIRE(before > 0);
        ::poll(nullptr, 0, 1000);
        CHECK(switches(pid) - before < 10);
    }
}

/// Follows a worker with strace, whose output goes to FILE "trace"; false: it may not.
bool follow(const Server& server, std::optional<Program>& strace, const string& what) {
    const string worker = to_string(server.worker()), trace = server.dir.path + "/trace";
    strace.emplace(vector<string>{"strace", "-e", what, "-o", trace, "-p", worker});
    if (wait_for([&] { return status_of(server.worker(), "TracerPid") != "0"; })) { return true; }
    MESSAGE("not run: strace cannot look at processes");
    return false;
}

TEST_CASE("a worker does not yield its processor for each request of several clients" *
          doctest::skip(!have("strace"))) {
    const Server server(kHello, {"-w", "1"});
    Client idle(server);
    CHECK(get(server).status == 200);  // a worker with one client may
    std::optional<Program> strace;
    if (!follow(server, strace, "trace=sched_yield")) { return; }
    for (int i = 0; i < 100; ++i) { CHECK(get(server).status == 200); }
    strace.reset();
    CHECK(count(read_file(server.dir.path + "/trace"), "sched_yield") < 50);
}

TEST_CASE("a runner that is nobody's child any more is followed by another" *
          doctest::skip(!have("strace"))) {
    Server server(kHello, {"-w", "1", "-t", "2"});
    std::optional<Program> strace;
    if (!follow(server, strace, "inject=wait4:error=ECHILD:when=1")) { return; }
    const pid_t runner = server.runner();
    ::kill(runner, SIGKILL);
    CHECK(server.log_has("Runner (pid:" + to_string(runner) + ") "));
    strace.reset();
    CHECK(get(server).status == 200);
    CHECK_FALSE(has_pid(server.runners(), runner));
    server.signal(SIGTERM);
    CHECK(server.wait_end());
}

TEST_CASE("an application that goes on after its client left ends in peace at a graceful stop") {
    const string app = kTools + R"py(
import atexit
atexit.register(mark, "left")

def long(environ, start_response):
    mark("running")
    time.sleep(float(environ["QUERY_STRING"]))
    mark("done")
    return reply(start_response, "ok")
)py";
    for (const size_t threads : {size_t{1}, size_t{2}}) {
        CAPTURE(threads);
        Server server(app, {"-w", "1", "--threads", to_string(threads)});
        vector<Client> clients;
        for (size_t i = 0; i < threads; ++i) {
            clients.emplace_back(server);
            clients.back().send(get_bytes(i == 0 ? "/long?0.5" : "/long?1"));
        }
        REQUIRE(wait_file(server, "running", threads));
        for (Client& client : clients) { client.reset(); }
        REQUIRE(wait_for([&] { return count(server.access(), " 499 ") == threads; }));
        server.signal(SIGTERM);
        REQUIRE(server.wait_end());
        CHECK(read_file(server.dir.path + "/left") == "x");
        CHECK(read_file(server.dir.path + "/done") == string(threads, 'x'));
        CHECK_FALSE(contains(server.log(), "protocol"));
    }
}

TEST_CASE("a runner that answers without reading the body, and ends, has answered") {
    const Server server("", {"-w", "1", "--runner",
                             "sh -c 'printf 0:,; head -c 1 >/dev/null; printf \"22:Status: 200 "
                             "OK\n\nanswer,0:,\"'"});
    const Reply reply = post(server, "/", string(4 << 20, 'x'));
    CHECK(reply.status == 200);
    CHECK(reply.body == "answer");
}

TEST_CASE("a client that reads slowly, but reads, gets all of a response") {
    const Server server(R"py(
def app(environ, start_response):
    start_response("200 OK", [("Content-Length", "12000000")])
    return [b"x" * 12000000]
)py",
                        {"-w", "1", "-t", "1"});
    Client client(server);
    client.send("GET / HTTP/1.1\r\n\r\n");
    string bytes;
    for (int i = 0; i < 50; ++i) {  // 2.5 s, much longer than the timeout
        bytes += client.read_until([](const string& text) { return text.size() >= 40000; });
        ::poll(nullptr, 0, 50);
    }
    CHECK(Reply(bytes + client.read_all()).whole);
    Client slower(server);  // too slow for its socket to become writable within the timeout
    slower.send("GET / HTTP/1.1\r\n\r\n");
    for (int i = 0; i < 25; ++i) {
        char piece[4000];
        CHECK(::recv(slower.fd.get(), piece, sizeof piece, MSG_WAITALL) == sizeof piece);
        ::poll(nullptr, 0, 100);
    }
    CHECK(slower.read_all().size() > 12'000'000 - 25 * 4000);
}

TEST_CASE("a stream that its client has whole is left: HEAD, 304, more than Content-Length") {
    const Server server(kTools + R"py(
def stream(environ, start_response):
    query = environ["QUERY_STRING"]
    start_response(query.replace("+", " ") or "200 OK",
                   [("Content-Length", "5")] if query == "200+long" else [])
    try:
        while True:
            yield b"longer"
            if query == "200+long": wait("read")  # what the client reads needs no more from here
    finally:
        mark("left")
)py",
                        {"-w", "1", "-t", "3"});
    const string targets[] = {"GET /stream?200+long", "HEAD /stream", "GET /stream?304+x"};
    int left = 0;
    for (const string& target : targets) {
        CAPTURE(target);
        const Reply reply = request(server.port(), target + " HTTP/1.1\r\nHost: x\r\n\r\n");
        CHECK((reply.status == 200 || reply.status == 304));
        CHECK(reply.whole);
        write_file(server.dir.path + "/read", "");
        CHECK(wait_file(server, "left", static_cast<size_t>(++left)));
        CHECK(get(server, "/hello").body == "hello");
    }
    CHECK_FALSE(contains(server.log(), "TIMEOUT"));
}

TEST_CASE("a pipe in file_wrapper is sent as it comes") {
    const Server server(kTools + R"py(
def pipe(environ, start_response):
    out = subprocess.Popen("for i in 1 2 3 4; do echo line $i; sleep 0.8; done", shell=True,
                           stdout=subprocess.PIPE).stdout
    start_response("200 OK", [])
    return environ["wsgi.file_wrapper"](out, 7)
)py",
                        {"-w", "1", "-t", "2"});
    CHECK(get(server, "/pipe").body == "line 1\nline 2\nline 3\nline 4\n");
}

TEST_CASE("a failure that cannot even be reported is a 500, and the thread goes on") {
    for (const char* threads : {"1", "2"}) {
        CAPTURE(threads);
        const Server server(kTools + R"py(
def syntax(environ, start_response):
    raise SyntaxError("m", ("f", 1, "x", "text"))

def files(environ, start_response):
    sys.modules.pop("traceback", None)
    kept = []
    try:
        while True: kept.append(open("/dev/null"))
    finally:
        threading.Timer(0.5, kept.clear).start()
)py",
                            {"-w", "1", "-t", "5", "--threads", threads});
        for (const char* target : {"/syntax", "/files", "/syntax"}) {
            CHECK(get(server, target).status == 500);
        }
        CHECK(get(server, "/hello").body == "hello");
        CHECK_FALSE(contains(server.log(), "Runner (pid"));
    }
}

TEST_CASE("an error page for HEAD has no body, even where its line is refused") {
    const Server server(kHello, {"-w", "1", "--header-timeout", "1"});
    const std::pair<string, int> rows[] = {
        {"HEAD /" + string(5000, 'a') + " HTTP/1.1\r\nHost: x\r\n\r\n", 414},
        {"HEAD / HTTP/1.1\nHost: x\n\n", 400},
        {"HEAD / HTTP/1.1\r\nHost", 408},
        {"HEAD / HTTP/9.1\r\nHost: x\r\n\r\n", 505},
    };
    for (const auto& [bytes, status] : rows) {
        const Reply reply = request(server.port(), bytes);
        CHECK(reply.status == status);
        CHECK(reply.body == "");
    }
}

TEST_CASE("close() after a failure says nothing more to the client") {
    const Server server(kTools + R"py(
class Items:
    def __init__(self, start_response): self.start_response = start_response
    def __iter__(self): raise ValueError
    def close(self): self.start_response("200 OK", [])(b"from close()")

def late(environ, start_response):
    return Items(start_response)
)py",
                        {"-w", "1"});
    const Reply reply = get(server, "/late");
    CHECK(reply.status == 500);
    CHECK_FALSE(contains(reply.body, "from close()"));
}

TEST_CASE("write() of a thread that goes on after the end of its request disturbs nobody") {
    const Server server(kTools + R"py(
def background(environ, start_response):
    write, begun = start_response("200 OK", []), time.time()
    def go_on():
        while time.time() < begun + 0.03: write(b"z")
    threading.Thread(target=go_on).start()
    time.sleep(0.002)
    return [b"end"]
)py",
                        {"-w", "1", "--threads", "2"});
    for (int i = 0; i < 100; ++i) { CHECK(get(server, "/background").whole); }
    CHECK_FALSE(contains(server.log(), "broke the protocol"));
}

TEST_SUITE_END();

// --- slow, hostile and broken clients, full disks, dying parts -------------------------------
TEST_SUITE_BEGIN("hold");

constexpr const char* kHold = R"py(

def big(environ, start_response):
    start_response("200 OK", [("Content-Length", "1000000")])
    return [b"x" * 1000000]

def length(environ, start_response):
    size = 0
    while True:
        data = environ["wsgi.input"].read(1 << 20)
        if not data:
            return reply(start_response, size)
        size += len(data)
)py";

/// Sets a limit of the server's process, and of all that it starts, until the end of a test.
struct Limit {
    Limit(decltype(RLIMIT_NOFILE) what, rlim_t most, rlim_t hard = 0) {
        Server::before_exec = [what, most, hard, others = outer] {
            if (others) { others(); }
            const struct rlimit limit = {most, std::max(most, hard)};
            ::setrlimit(what, &limit);
        };
    }
    ~Limit() { Server::before_exec = outer; }
    const std::function<void()> outer = Server::before_exec;
};

/// Lets this process have some thousand connections.
void raise_descriptors() {
    struct rlimit limit = {};
    ::getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = std::min<rlim_t>(limit.rlim_max, 8192);
    ::setrlimit(RLIMIT_NOFILE, &limit);
    REQUIRE(limit.rlim_cur > 3500);
}

/// How many of `n` plain requests in a row are answered within a second each.
int answered(const Server& server, int n) {
    int good = 0;
    for (int i = 0; i < n; ++i) {
        Client client(server);
        good += client.send(get_bytes("/hello")) && Reply(client.read_all(1s)).body == "hello";
    }
    return good;
}

/// Sends the rest of what each of them has begun; how often they got which status.
map<int, int> finish(vector<Client>& clients, const string& rest) {
    map<int, int> answers;
    for (Client& client : clients) {
        client.send(rest);
        ++answers[Reply(client.read_all()).status];
    }
    return answers;
}

TEST_CASE("hundreds of slow clients are held, answered in the end, and felt by nobody") {
    raise_descriptors();
    const Server server(kTools + kHold, {"-w", "2", "--header-timeout", "60"});
    REQUIRE(server.wait_ready_workers(2));
    {
        const vector<Client> silent = hold(server, 500, "");
        CHECK(answered(server, 50) == 50);
    }
    vector<Client> heads = hold(server, 500, "GET /hello HTTP/1.1\r\n");
    vector<Client> bodies =
        hold(server, 200, "POST /length HTTP/1.1\r\nContent-Length: 20\r\n\r\n");
    for (int i = 0; i < 10; ++i) {
        for (const Client& each : heads) { each.send("A: b\r\n"); }
        for (const Client& each : bodies) { each.send("x"); }
        CHECK(answered(server, 10) == 10);
    }
    for (Client& each : heads) {
        each.send("\r\n");
        REQUIRE(Reply(each.read_all()).body == "hello");
    }
    for (Client& each : bodies) {
        each.send(string(10, 'x'));
        REQUIRE(Reply(each.read_all()).body == "20");
    }
    Client::receive_buffer = 4096;
    vector<Client> readers = hold(server, 200, get_bytes("/big"));
    Client::receive_buffer = 0;
    // Until the application has made them all.
    CHECK(wait_for([&] { return answered(server, 1) == 1; }, 20s));
    CHECK(answered(server, 50) == 50);
    for (Client& each : readers) {
        const Reply reply(each.read_all());
        REQUIRE(reply.whole);
        REQUIRE(reply.body == string(1000000, 'x'));
    }
    const vector<Client> more_than_fit = hold(server, 3000, "");
    CHECK(answered(server, 50) == 50);
    CHECK_FALSE(contains(server.log(), "[ERROR]"));
}

/// Kilobytes of memory of its own that all processes of a server hold.
long resident(const Server& server) {
    long sum = 0;
    for (const pid_t pid : processes_with(server.mark)) {
        const string status = read_file("/proc/" + to_string(pid) + "/status");
        const size_t at = status.find("RssAnon:");
        if (at != string::npos) { sum += std::atol(status.c_str() + at + 8); }
    }
    return sum;
}

TEST_CASE("what many slow clients have not taken is in files, but for 16 MiB and a piece each") {
    const Server server(kTools + kHold + R"py(
def drops(environ, start_response):
    start_response("200 OK", [])
    return (b"x" for _ in range(50000))
)py",
                        {"-w", "1"});
    CHECK(answered(server, 20) == 20);
    const long before = resident(server);
    Client::receive_buffer = 4096;
    vector<Client> readers;
    for (int i = 0; i < 100; ++i) {  // these take most of it
        readers.emplace_back(server).send(get_bytes("/big"));
        readers.back().read_until([](const string& text) { return text.size() > 800000; });
    }
    const vector<Client> others = hold(server, 100, get_bytes("/big"));
    Client::receive_buffer = 0;
    // Until the application has made them all.
    CHECK(wait_for([&] { return answered(server, 1) == 1; }, 20s));
    const long pieces = 200 * 64, slack = 12 * 1024;
    if (!is_sanitized()) { CHECK(resident(server) - before < 16 * 1024 + pieces + slack); }
    const auto writes = [&] { return calls_of(server.worker(), "syscw"); };
    const long so_far = writes();  // who is quick pays no file for each little piece
    const Reply drops(request(server.port(), get_bytes("/drops"), 30s));
    CHECK(drops.whole);
    CHECK(drops.body.size() == 50000);
    CHECK(writes() - so_far < 5000);
}

TEST_CASE("the memory for large bodies is not taken from the kernel anew for each piece") {
    if (is_sanitized()) { return; }  // whose malloc() is another
    const Server server(kTools + kHold, {"-w", "1"});
    const auto upload = [&] {
        CHECK(request(server.port(), sized("POST /length", string(1000000, 'u'))).body ==
              "1000000");
    };
    const auto faults = [&] {
        return std::atol(output_of("ps -o min_flt= -p " + to_string(server.worker())).c_str());
    };
    for (int i = 0; i < 5; ++i) { upload(); }
    const long before = faults();
    for (int i = 0; i < 20; ++i) { upload(); }
    CHECK(faults() - before < 20 * 30);
}

TEST_CASE("many large heads are bounded as a whole; one is served, and so is who has a small one") {
    const Server server(kTools, {"-w", "1"});
    string head = "GET /hello HTTP/1.1\r\n";
    for (int i = 0; i < 90; ++i) {
        head += "X-" + to_string(i) + ": " + string(8000, 'x') + "\r\n";
    }
    Client first(server);
    first.send(head + "\r\n");
    CHECK(Reply(first.read_all()).status == 200);
    const long before = resident(server);
    vector<Client> clients = hold(server, 100, head);  // complete but for its last line
    CHECK(wait_for([&] { return unread(server.port()) == 0; }));
    if (!is_sanitized()) { CHECK(resident(server) - before < 48 * 1024); }
    CHECK(get(server, "/hello").status == 200);
    map<int, int> answers = finish(clients, "\r\n");
    CHECK(answers[200] >= 5);
    CHECK(answers[200] + answers[503] == 100);
    Client last(server);  // what is free again is for others
    last.send(head + "\r\n");
    CHECK(Reply(last.read_all()).status == 200);
}

TEST_CASE("so are those that are complete at the next read, and wait for the runner") {
    raise_descriptors();
    const Server server(kTools, {"-w", "1"});
    Client running(server);
    running.send(get_bytes("/gate"));
    REQUIRE(wait_file(server, "at_gate"));
    const string field = "X: " + string(8000, 'x') + "\r\n", fields = field + field;
    const long before = resident(server);
    vector<Client> clients = hold(server, 800, "GET /hello HTTP/1.1\r\n" + fields);
    CHECK(wait_for([&] { return unread(server.port()) == 0; }, 30s));
    for (Client& client : clients) { client.send(fields + fields + fields + field + "\r\n"); }
    CHECK(wait_for([&] { return unread(server.port()) == 0; }, 30s));
    if (!is_sanitized()) { CHECK(resident(server) - before < 48 * 1024); }
    open_gate(server);
    map<int, int> answers = finish(clients, "");
    CHECK(answers[200] + answers[503] == 800);
}

TEST_CASE("so are trailer lines that do not end") {
    const Server server(kTools, {"-w", "1", "--limit-request-field_size", "1048576"});
    CHECK(get(server, "/hello").status == 200);
    const long before = resident(server);
    vector<Client> clients =
        hold(server, 60,
             "POST /hello HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nA: " +
                 string(1000000, 'x'));
    CHECK(wait_for([&] { return unread(server.port()) == 0; }, 30s));
    if (!is_sanitized()) { CHECK(resident(server) - before < 48 * 1024); }
    map<int, int> answers = finish(clients, "\r\n\r\n");
    CHECK(answers[200] >= 5);
    CHECK(answers[200] + answers[503] == 60);
}

TEST_CASE("memory stays flat for bodies and responses of 300 MB, whoever is slow") {
    Server server(kTools + R"py(
import hashlib

def up(environ, start_response):
    digest = hashlib.sha256()
    for piece in iter(lambda: environ["wsgi.input"].read(65536), b""):
        digest.update(piece)
    return reply(start_response, digest.hexdigest())

def down(environ, start_response):
    start_response("200 OK", [("Content-Length", str(300 << 20))])
    for i in range(300):
        yield bytes([i % 256]) * (1 << 20)

def file(environ, start_response):
    with open("zeros", "wb") as made:
        made.truncate(300 << 20)
    start_response("200 OK", [("Content-Length", str(300 << 20))])
    return environ["wsgi.file_wrapper"](open("zeros", "rb"))
)py");
    REQUIRE(server.wait_ready_workers(2));
    CHECK(get(server, "/hello").status == 200);
    const long before = resident(server);
    long most = before;
    const auto look = [&] { most = std::max(most, resident(server)); };
    const auto same_file = [&](const string& target, bool slow) {  // counts what comes
        Client client(server);
        client.send(get_bytes(target));
        size_t size = 0;
        string head;
        for (int i = 0;; ++i) {
            char buffer[262144];
            if (!client.readable(10s)) { return size_t{0}; }
            const ssize_t n = ::recv(client.fd.get(), buffer, sizeof buffer, 0);
            if (n <= 0) { return size - head.find("\r\n\r\n") - 4; }
            size += static_cast<size_t>(n);
            if (head.empty()) { head.assign(buffer, static_cast<size_t>(n)); }
            if (i % 200 == 0) { look(); }
            if (slow && i < 50) { ::poll(nullptr, 0, 10); }
        }
    };
    for (const bool slow : {false, true}) {
        CHECK(same_file("/down", slow) == size_t{300} << 20);
        CHECK(same_file("/file", slow) == size_t{300} << 20);
    }
    Client client(server);
    client.send("POST /up HTTP/1.1\r\nContent-Length: " + to_string(300 << 20) + "\r\n\r\n");
    const string piece(1 << 20, 'u');
    for (int i = 0; i < 300; ++i) {
        REQUIRE(client.send(piece));
        if (i % 20 == 0) { look(); }
    }
    const string digest = Reply(client.read_all(20s)).body;
    look();
    CHECK(digest == python("import hashlib\nd = hashlib.sha256()\n"
                           "for _ in range(300): d.update(b'u' * (1 << 20))\n"
                           "print(d.hexdigest(), end='')\n"));
    if (!is_sanitized()) { CHECK(most - before < 24 * 1024); }
}

TEST_CASE("a full disk: uploads get 507, downloads their whole response, nothing dies") {
    const Limit files(RLIMIT_FSIZE, 1 << 20);
    Server server(kTools + R"py(

def down(environ, start_response):
    start_response("200 OK", [("Content-Length", str(30 << 20))])
    for i in range(30):
        mark("at_%d" % i)
        yield bytes([i]) * (1 << 20)
)py",
                  {"-t", "2"});
    REQUIRE(server.wait_ready_workers(2));
    const vector<pid_t> before = server.workers();
    Client upload(server);
    upload.send("POST /hello HTTP/1.1\r\nContent-Length: 4000000\r\n\r\n");
    upload.send(string(4000000, 'x'));
    CHECK(Reply(upload.read_all()).status == 507);
    CHECK(server.log_has("[ERROR] 507 to 127.0.0.1: no room on disk for the body: File too large"));
    CHECK(server.access_has("POST /hello HTTP/1.1\" 507 "));
    Client reader(server);
    reader.send(get_bytes("/down"));
    CHECK(answered(server, 10) == 10);
    REQUIRE(wait_file(server, "at_0"));
    ::poll(nullptr, 0, 2500);  // longer than --timeout: it is the client that is slow
    CHECK_FALSE(exists(server.dir.path + "/at_9"));  // the application waits, too
    const Reply reply(reader.read_all());
    CHECK(reply.whole);
    bool same = reply.body.size() == 30 << 20;
    for (size_t i = 0; same && i < reply.body.size(); ++i) {
        same = reply.body[i] == static_cast<char>(i >> 20);
    }
    CHECK(same);
    CHECK(server.workers() == before);
}

TEST_CASE("a client that leaves: not run if queued, its upload gone at once") {
    Server server(kTools + kOnce + R"py(
def stay(environ, start_response):
    mark("at_stay")
    wait("leave")
    return reply(start_response, "stayed")
)py",
                  {"-w", "1"});
    const pid_t worker = server.worker();
    Client busy(server);
    busy.send(get_bytes("/gate"));
    REQUIRE(wait_file(server, "at_gate"));
    vector<Client> queued = hold(server, 5, get_bytes("/once?1"));
    vector<Client> patient = hold(server, 2, get_bytes("/once?2"));
    Client stays(server);
    stays.send(get_bytes("/stay"));
    ::poll(nullptr, 0, 100);  // they get into the queue
    for (Client& each : queued) { each.reset(); }
    CHECK(wait_for([&] { return queued.size() == 5; }));
    Client upload(server);
    upload.send("POST /hello HTTP/1.1\r\nContent-Length: 4000000\r\n\r\n" + string(1000000, 'x'));
    const auto temp_files = [&] {
        return output_of("ls -l /proc/" + to_string(worker) + "/fd | grep -c 'server-.*deleted'");
    };
    const string without = "1";  // the heartbeat file
    CHECK(wait_for([&] { return temp_files() != without; }));
    upload.reset();
    CHECK(wait_for([&] { return temp_files() == without; }));
    CHECK(server.access_has("POST /hello HTTP/1.1\" 499 "));
    open_gate(server);
    CHECK(Reply(busy.read_all()).body == "through");
    for (Client& each : patient) { CHECK(Reply(each.read_all()).body == "ok"); }
    CHECK(count(server.access(), "GET /once?1 HTTP/1.1\" 499 ") == 5);
    REQUIRE(wait_file(server, "at_stay"));
    stays.reset();
    CHECK(server.access_has("GET /stay HTTP/1.1\" 499 "));
    write_file(server.dir.path + "/leave", "");
    CHECK(runs_of(server) == map<string, int>{{"2", 2}});
}

TEST_CASE("64 descriptors are enough to serve, and to hold off more clients than fit") {
    raise_descriptors();
    const Limit descriptors(RLIMIT_NOFILE, 64);
    Server server(kTools + kHold);
    REQUIRE(server.wait_ready_workers(2));
    CHECK(server.log_has("lowered"));
    const vector<Client> silent = hold(server, 300, "");
    CHECK(answered(server, 20) == 20);
    const vector<Client> heads = hold(server, 300, "GET /hello HTTP/1.1\r\n");
    CHECK(answered(server, 20) == 20);
    const string large(300000, 'x');
    for (int i = 0; i < 5; ++i) {
        CHECK(request(server.port(), post_bytes("/length", large, false)).body == "300000");
    }
    for (const pid_t worker : server.workers()) {
        const long before = cpu_ticks(worker);
        ::poll(nullptr, 0, 300);
        CHECK(cpu_ticks(worker) - before < ::sysconf(_SC_CLK_TCK) / 10);
    }
}

TEST_CASE("descriptors that the server inherited are none for its clients") {
    raise_descriptors();
    const auto inherit = [](int most) {
        Server::before_exec = [most] {
            while (::dup(STDERR_FILENO) < most) {}
        };
    };
    inherit(700);
    {
        const Server server(kTools + kHold, {"-w", "1"});
        CHECK(server.log_has("--worker-connections lowered from 1000 to 3"));
        const vector<Client> silent = hold(server, 500, "");
        CHECK(answered(server, 20) == 20);
    }
    inherit(1200);
    Server crowded(kTools, {"-w", "1"}, {}, false);
    Server::before_exec = nullptr;
    CHECK(crowded.wait_end());
    CHECK(crowded.exit_code() == 1);
    CHECK_MESSAGE(contains(crowded.log(), "Error: too many descriptors are open"), crowded.log());
}

TEST_CASE("the application has the soft limit on descriptors that the server was started with") {
    const Limit descriptors(RLIMIT_NOFILE, 300, 4096);
    const Server server(kTools + R"py(
import resource

def limit(environ, start_response):
    return reply(start_response, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
)py",
                        {"-w", "1"});
    CHECK(get(server, "/limit").body == "300");
}

TEST_CASE("a soft limit of too few descriptors for a runner is raised") {
    const Limit descriptors(RLIMIT_NOFILE, 8, 4096);
    CHECK(get(Server(kTools, {"-w", "1"}), "/hello").body == "hello");
}

TEST_CASE("a worker without a descriptor for one more client lets one go, or else rests") {
    const Server server(kTools, {"-w", "1"});
    const pid_t worker = server.worker();
    const auto first_free = [worker] {
        rlim_t fd = 0;
        while (exists("/proc/" + to_string(worker) + "/fd/" + to_string(fd))) { ++fd; }
        return fd;
    };
    const rlim_t before = first_free();
    Client silent(server);
    REQUIRE(wait_for([&] { return first_free() > before; }));
    struct rlimit ample = {};
    REQUIRE(::prlimit(worker, RLIMIT_NOFILE, nullptr, &ample) == 0);
    const struct rlimit few = {first_free(), ample.rlim_max};
    REQUIRE(::prlimit(worker, RLIMIT_NOFILE, &few, nullptr) == 0);
    CHECK(get(server, "/hello").body == "hello");  // in the place of the silent one
    CHECK(silent.read_all() == "");
    CHECK(count(server.log(), "cannot accept: Too many open files") == 1);
    Client running(server);  // for whom there is one, but not for another, who is not there yet
    REQUIRE(wait_for([&] { return first_free() > before; }));
    CHECK_FALSE(running.readable(200ms));
    running.send(get_bytes("/gate"));
    Client waiting(server);
    waiting.send(get_bytes("/hello"));
    CHECK_FALSE(waiting.readable(500ms));
    CHECK(count(server.log(), "cannot accept") > 1);
    CHECK(count(server.log(), "cannot accept") < 10);
    REQUIRE(::prlimit(worker, RLIMIT_NOFILE, &ample, nullptr) == 0);
    open_gate(server);
    CHECK(Reply(running.read_all()).body == "through");
    CHECK(Reply(waiting.read_all()).body == "hello");
}

TEST_CASE("a head of 32768 fields does not keep a worker from its heartbeat") {
    const Server server(kProbe, {"-w", "1", "-t", "2", "--limit-request-fields", "0"});
    string fields;  // with the Host of http()
    for (int i = 1; i < 32766; ++i) { fields += "x-" + to_string(i) + ": y\r\n"; }
    fields += "X-1: z\r\n";
    const Reply full(request(server.port(), http("GET /full", fields + "X-32765: z\r\n")));
    CHECK(full.status == 200);
    CHECK(has_line(full.body, "HTTP_X_1=y,z"));
    CHECK(has_line(full.body, "HTTP_X_2=y"));
    CHECK(has_line(full.body, "HTTP_X_32765=y,z"));
    const string more = fields + "A: b\r\nC: d\r\n";
    CHECK(request(server.port(), http("GET /more", more)).status == 431);
    string repeated = "A: y\r\n";
    for (int i = 1; i < 110; ++i) {
        repeated += "x-" + to_string(i) + ": " + string(8000, 'z') + "\r\n";
    }
    for (int i = 0; i < 27000; ++i) { repeated += "A: y\r\n"; }
    std::vector<Client> clients;  // the worker has to do with all of them at a time
    for (int i = 0; i < 16; ++i) {
        clients.emplace_back(server.port()).send(http("GET /full", repeated));
    }
    for (Client& each : clients) {
        const int status = Reply(each.read_all()).status;
        CHECK((status == 200 || status == 503));  // of those who are more than 16 MiB
    }
    CHECK(count(server.log(), "WORKER TIMEOUT") == 0);
}

TEST_CASE("floods cost bounded time, no descriptor, no memory, and no processor time afterwards") {
    raise_descriptors();
    Server server(kTools + kHold, {"-w", "2"});
    REQUIRE(server.wait_ready_workers(2));
    CHECK(answered(server, 20) == 20);
    const auto descriptors = [&] {
        string counts;
        for (const pid_t pid : processes_with(server.mark)) {
            counts += output_of("ls /proc/" + to_string(pid) + "/fd | wc -l") + " ";
        }
        return counts;
    };
    const string before = descriptors();
    const long memory = resident(server);
    Random random;
    const string parts[] = {"",
                            "G",
                            "\r\n",
                            "GET /hello HTT",
                            "GET /hello HTTP/1.1\r\n\r\n",
                            "\x16\x03\x01 garbage \xff\xfe\r\n",
                            "GET /hello HTTP/1.1\r\nA",
                            "POST /length HTTP/1.1\r\nContent-Length: 100000\r\n\r\nxxx",
                            "POST /length HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
                            "GET /big HTTP/1.1\r\n\r\n"};
    for (int i = 0; i < 10000; ++i) {
        Client client(server);
        client.send(parts[random.below(std::size(parts))]);
        const int end = static_cast<int>(random.below(20));  // 0: it waits for one
        end > 9 ? client.reset() : end == 0 ? (void)client.readable(2ms) : void();
    }
    CHECK(answered(server, 20) == 20);
    string pipelined;
    for (int i = 0; i < 5000; ++i) { pipelined += get_bytes("/hello"); }
    CHECK(Reply(request(server.port(), pipelined)).status == 200);
    string head = "GET /hello HTTP/1.1\r\n";
    for (int i = 0; i < 100; ++i) {
        head += "A" + to_string(i) + ": " + string(8180, 'x') + "\r\n";
    }
    CHECK(request(server.port(), head + "\r\n").status == 200);
    string chunks = "POST /length HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n";
    for (int i = 0; i < 1000000; ++i) { chunks += "1\r\nx\r\n"; }
    CHECK(request(server.port(), chunks + "0\r\n\r\n", 30s).body == "1000000");
    const string extension = "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1;";
    CHECK(request(server.port(), extension + string(3000000, 'x')).status == 400);
    string trailers = "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n";
    for (int i = 0; i < 100000; ++i) { trailers += "A: b\r\n"; }
    CHECK(request(server.port(), trailers).status == 431);
    CHECK_MESSAGE(wait_for([&] { return descriptors() == before; }),
                  (before + "→ " + descriptors()));
    CHECK(answered(server, 20) == 20);
    if (!is_sanitized()) { CHECK(resident(server) - memory < 24000); }
    for (const pid_t pid : processes_with(server.mark)) {
        CHECK(parent_and_state(pid).second != 'Z');
        const long ticks = cpu_ticks(pid);
        ::poll(nullptr, 0, 100);
        CHECK(cpu_ticks(pid) - ticks < 2);
    }
}

TEST_CASE(
    "whatever dies or freezes under load, no request hangs, is answered twice, or goes "
    "unexplained") {
    const char* length = std::getenv("FAULT_SECONDS");  // 60 for a long run
    const auto span = seconds(length != nullptr ? std::atoi(length) : 8);
    const char* seed = std::getenv("FAULT_SEED");
    Random random;
    random.state = seed != nullptr ? static_cast<uint32_t>(std::atoi(seed)) : 1;
    const Limit descriptors(RLIMIT_NOFILE, 128), files(RLIMIT_FSIZE, 8 << 20);
    Server server(kTools + kOnce, {"-w", "3", "-t", "2"});
    REQUIRE(server.wait_ready_workers(3));
    const vector<Client> silent = hold(server, 200, "");  // more than fit
    const string large(10 << 20, 'x');                    // more than a file may have
    std::set<int> uploaded;                               // what that was answered with
    const Time end = Clock::now() + span;
    Time next = Clock::now() + 300ms;
    size_t kills = 0, stops = 0;
    const map<string, int> answers = load(server, 12, "/jitter?id=", [&] {
        if (Clock::now() < next) { return Clock::now() < end; }
        next = Clock::now() + std::chrono::milliseconds(100 + random.below(400));
        const bool worker = random.below(3) == 0, kill = random.below(3) != 0;
        const vector<pid_t> victims = worker ? server.workers() : server.runners();
        if (!victims.empty()) {
            ::kill(victims[random.below(victims.size())], kill ? SIGKILL : SIGSTOP);
            kill ? ++kills : ++stops;
        }
        if (random.below(4) == 0) {
            uploaded.insert(request(server.port(), post_bytes("/", large, false)).status);
        }
        return Clock::now() < end;
    });
    CAPTURE(show_answers(answers));
    MESSAGE("killed ", kills, ", stopped ", stops, ": ", show_answers(answers));
    size_t good = 0, lost = 0;
    for (const auto& [answer, times] : answers) {
        const string status = answer.substr(0, 4);
        (answer == "200 ok" ? good : lost) += static_cast<size_t>(times);
        CHECK((status == "200 " || status == "502 " || status == "503 " || status == "504 " ||
               answer == "cut"));
    }
    CHECK(good > 500);
    const string log = server.log();
    const size_t named = count(log, "502 to ") + count(log, "503 to ") + count(log, "504 to ");
    const size_t workers = count(log, "[ERROR] Worker (pid:");
    CHECK(lost <= named + workers * 12);  // a worker takes what it holds with it, and says so
    CHECK(uploaded.count(507) == 1);
    CHECK(uploaded.count(200) == 0);
    CHECK(contains(log, "lowered"));
    for (const auto& each : runs_of(server)) { REQUIRE(each.second == 1); }
    CHECK(
        wait_for([&] { return server.wait_ready_workers(3) && answered(server, 20) == 20; }, 40s));
    CHECK(wait_for([&] { return processes_with(server.mark).size() == 7; }, 40s));
}

TEST_CASE("who stays after an error page is let go: after 5 s if silent, after 30 s if not") {
    const Server server(kHello, {"-w", "1"});
    const string sockets = "ls -l /proc/" + to_string(server.worker()) + "/fd | grep -c socket:";
    Client talker(server);
    talker.send("GET / HTTP/3\r\n\r\nmore");
    CHECK(Reply(talker.read_all()).status == 505);
    const Time begun = Clock::now();
    const string before = output_of(sockets);
    Client client(server);
    client.send("GET / HTTP/3\r\n\r\nmore");
    CHECK(Reply(client.read_all()).status == 505);
    const Time start = Clock::now();
    ::poll(nullptr, 0, 4000);
    CHECK(client.send("and more"));
    CHECK(talker.send("and more"));
    ::poll(nullptr, 0, 4000);
    CHECK(output_of(sockets) != before);
    CHECK(talker.send("and more"));
    CHECK(wait_for([&] { return output_of(sockets) == before; }));
    CHECK(seconds_since(start) < 11);
    CHECK(client.send("too late"));
    CHECK(wait_for([&] { return !client.send("for anyone"); }));
    CHECK(wait_for([&] { return !talker.send("and more"); }, 35s));
    CHECK(seconds_since(begun) > 29.5);
    CHECK(seconds_since(begun) < 33);
    CHECK(count(server.access(), "\" 505 ") == 2);
}

TEST_SUITE_END();

// --- signals, daemons, users, supervisors, proxies -------------------------------------------
TEST_SUITE_BEGIN("operations");

TEST_CASE("addresses are found in a list of addresses and networks") {
    const struct {
        string list, address;
        bool listed;
    } cases[] = {
        {"127.0.0.1,::1", "127.0.0.1", true},
        {"127.0.0.1,::1", "::1", true},
        {"127.0.0.1,::1", "127.0.0.2", false},
        {"127.0.0.1,::1", "::2", false},
        {"127.0.0.1, 10.0.0.1", "10.0.0.1", true},
        {"*", "8.8.8.8", true},
        {"*", "2001:db8::1", true},
        {"", "127.0.0.1", false},
        {"", "", true},
        {"10.0.0.0/8", "10.255.1.2", true},
        {"10.0.0.0/8", "11.0.0.1", false},
        {"192.168.4.0/22", "192.168.7.255", true},
        {"192.168.4.0/22", "192.168.8.0", false},
        {"0.0.0.0/0", "1.2.3.4", true},
        {"0.0.0.0/0", "::1", false},
        {"2001:db8::/33", "2001:db8:7fff::1", true},
        {"2001:db8::/33", "2001:db8:8000::1", false},
        {"::/0", "1.2.3.4", false},
        {"10.0.0.0/33", "10.0.0.0", false},
        {"10.0.0.0/x", "10.0.0.0", false},
        {"nonsense,10.0.0.1", "10.0.0.1", true},
        {"10.0.0.1", "nonsense", false},
    };
    for (const auto& row : cases) {
        CAPTURE(row.list);
        CAPTURE(row.address);
        CHECK(is_listed(Exact(row.list).view(), row.address) == row.listed);
    }
}

TEST_CASE("behind a proxy that speaks the PROXY protocol the client is who it says") {
    const Server server(kProbe, {"--proxy-protocol"});
    const Server strict(kProbe, {"--proxy-protocol", "--proxy-allow-from", "10.0.0.0/8",
                                 "--forwarded-allow-ips", "10.0.0.0/8"});
    const string v1 = "PROXY TCP4 10.0.0.7 127.0.0.1 12345 80\r\n";
    const string request_bytes = http("GET /", "X-Forwarded-Proto: https\r\n");
    const Reply named = exchange(Client(server), v1 + request_bytes);
    CHECK(named.status == 200);
    CHECK(has_line(named.body, "REMOTE_ADDR=10.0.0.7"));
    CHECK(has_line(named.body, "REMOTE_PORT=12345"));
    CHECK(has_line(named.body, "SERVER_PORT=" + to_string(server.port())));
    CHECK(has_line(named.body, "wsgi.url_scheme=https"));  // the proxy is trusted, on loopback
    CHECK(server.access_has("10.0.0.7 - - ["));
    for (const string& header : {proxy_v2('\x20', '\0', ""), "PROXY UNKNOWN\r\n"s, ""s}) {
        const Reply local = exchange(Client(server), header + request_bytes);
        CHECK(has_line(local.body, "REMOTE_ADDR=127.0.0.1"));
    }
    CHECK(exchange(Client(server), "PROXY TCP4 x y 1 2\r\n" + request_bytes).status == 400);
    CHECK(exchange(Client(server), "PROXY TCP4 x y 1 2\r\n").status == 400);  // and nothing more
    CHECK(exchange(Client(server), v1 + v1 + request_bytes).status == 400);
    CHECK(exchange(Client(strict), v1 + request_bytes).status == 403);
    CHECK(strict.log_has("[WARNING] 403 to 127.0.0.1: "));  // and not to whom the header names
    const Reply plain = exchange(Client(strict), request_bytes);
    CHECK(has_line(plain.body, "wsgi.url_scheme=http"));  // whatever address a header might name
    for (const size_t first : {size_t{0}, size_t{6}}) {
        Client probe(server);  // a health check: the header, and nothing else
        probe.send(string("PROXY UNKNOWN\r\n").substr(0, first));
        CHECK(wait_for([&] { return unread(server.port()) == 0; }));
        probe.send(string("PROXY UNKNOWN\r\n").substr(first));
        probe.half_close();
        CHECK(probe.read_all() == "");
        CHECK_FALSE(contains(server.log(), "ends early"));
    }
    const Server without(kProbe);
    CHECK(exchange(Client(without), v1 + request_bytes).status == 400);
}

TEST_CASE("a trusted proxy says whether the client came by https") {
    const struct {
        string fields;
        int status;
        string trusted, other = "http";
    } cases[] = {
        {"", 200, "http"},
        {"X-Forwarded-Proto: https\r\n", 200, "https"},
        {"X-Forwarded-Proto: http\r\n", 200, "http"},
        {"X-Forwarded-Protocol: ssl\r\n", 200, "https"},
        {"X-Forwarded-Ssl: on\r\n", 200, "https"},
        {"X-Forwarded-Ssl: off\r\n", 200, "http"},
        {"X-Forwarded-Proto: https\r\nX-Forwarded-Ssl: on\r\n", 200, "https"},
        {"X-Forwarded-Proto: https\r\nX-Forwarded-Ssl: off\r\n", 400, ""},
        {"X-Forwarded-Proto: http\r\nX-Forwarded-Protocol: ssl\r\n", 400, ""},
        {"X-Forwarded-Proto: https\r\nX-Forwarded-Proto: https\r\n", 200, "https"},
        {"X-Forwarded-Proto: https\r\nX-Forwarded-Proto: http\r\n", 400, ""},
        {"X-Forwarded-Ssl: off\r\nX-Forwarded-Ssl: on\r\n", 400, ""},
        {"X-Forwarded-Proto: https,https\r\n", 200, "http"},
    };
    const Server trusting(kProbe), distrusting(kProbe, {"--forwarded-allow-ips", "10.0.0.0/8"});
    for (const auto& row : cases) {
        CAPTURE(row.fields);
        const Reply yes = exchange(Client(trusting), http("GET /", row.fields));
        CHECK(yes.status == row.status);
        if (row.status == 200) { CHECK(has_line(yes.body, "wsgi.url_scheme=" + row.trusted)); }
        const Reply no = exchange(Client(distrusting), http("GET /", row.fields));
        CHECK(has_line(no.body, "wsgi.url_scheme=http"));
    }
    const TempDir dir;
    const Server on_unix(kProbe, {"-b", "unix:" + dir.path + "/s", "--forwarded-allow-ips", ""});
    const Reply reply = exchange(Client(dir.path + "/s"), http("GET /", "X-Forwarded-Ssl: on\r\n"));
    CHECK(has_line(reply.body, "wsgi.url_scheme=https"));
}

constexpr const char* kTalkative = R"py(
import time
def app(environ, start_response):
    print("printed", environ["PATH_INFO"])
    if environ["PATH_INFO"] == "/slow":
        time.sleep(0.3)
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]
)py";

bool has_open(pid_t pid, const string& path) {
    return contains(output_of("ls -l /proc/" + to_string(pid) + "/fd"), path);
}

TEST_CASE("USR1 moves both logs, and what the application prints, to new files") {
    const TempDir dir;
    const string access = dir.path + "/access", errors = dir.path + "/errors";
    Server server(kTalkative, {"--access-logfile", access, "--error-logfile", errors}, {}, false);
    REQUIRE(wait_for([&] {
        return contains(read_file(errors), "Listening at") && server.ready_workers() == 2;
    }));
    const int port = port_in(read_file(errors));
    CHECK(request(port, get_bytes("/one")).body == "ok");
    CHECK(wait_for([&] { return contains(read_file(errors), "printed /one"); }));
    REQUIRE(::rename(access.c_str(), (access + ".1").c_str()) == 0);
    REQUIRE(::rename(errors.c_str(), (errors + ".1").c_str()) == 0);
    server.signal(SIGUSR1);
    REQUIRE(wait_for([&] { return exists(access) && exists(errors); }));
    const string old_access = read_file(access + ".1");
    const auto moved = [&] {                    // by all workers and runners
        vector<pid_t> pids = server.runners();  // though they have nothing to do
        for (const pid_t pid : server.workers()) { pids.push_back(pid); }
        for (const pid_t pid : pids) {
            if (has_open(pid, access + ".1") || has_open(pid, errors + ".1")) { return false; }
        }
        return true;
    };
    CHECK(wait_for(moved));
    for (int i = 0; i < 20; ++i) { CHECK(request(port, get_bytes("/two")).body == "ok"); }
    CHECK(wait_for([&] { return count(read_file(errors), "printed /two") == 20; }));
    CHECK(count(read_file(access), "GET /two") == 20);
    CHECK(read_file(access + ".1") == old_access);
    REQUIRE(::rename(dir.path.c_str(), (dir.path + "-gone").c_str()) == 0);
    server.signal(SIGUSR1);  // which finds no place for them: all goes on as it was
    CHECK(wait_for(
        [&] { return count(read_file(dir.path + "-gone/errors"), "cannot open the log") >= 3; }));
    CHECK_FALSE(wait_for([&] { return contains(read_file(dir.path + "-gone/errors"), "Hang up"); },
                         1500ms));
    for (int i = 0; i < 6; ++i) { CHECK(request(port, get_bytes("/three")).body == "ok"); }
    REQUIRE(::rename((dir.path + "-gone").c_str(), dir.path.c_str()) == 0);
    CHECK_FALSE(contains(read_file(errors + ".1"), "/two"));
    REQUIRE(::unlink(errors.c_str()) == 0);
    REQUIRE(::symlink((dir.path + "/none/errors").c_str(), errors.c_str()) == 0);
    REQUIRE(::rename(access.c_str(), (access + ".2").c_str()) == 0);
    server.signal(SIGUSR1);  // one that cannot be opened keeps no other where it was
    CHECK(wait_for([&] { return exists(access); }));
}

TEST_CASE("USR1 moves what an application prints that is still being loaded") {
    const TempDir dir;
    const string errors = dir.path + "/errors", old = errors + ".1";
    const string wait = "import os, time\nwhile not os.path.exists('go'): time.sleep(0.01)\n";
    const Server server(wait + kTalkative, {"-w", "1", "--error-logfile", errors}, {}, false);
    REQUIRE(wait_for([&] { return server.runners().size() == 1; }));
    REQUIRE(::rename(errors.c_str(), old.c_str()) == 0);
    server.signal(SIGUSR1);
    const auto moved = [&old](const vector<pid_t>& pids) {  // of /proc, which may miss one once
        return pids.size() == 1 && !has_open(pids[0], old);
    };
    REQUIRE(wait_for([&] { return moved(server.workers()); }));
    open_gate(server);
    CHECK(wait_for([&] { return moved(server.runners()); }));
    CHECK(request(port_in(read_file(old)), get_bytes("/late")).body == "ok");
    CHECK(contains(read_file(errors), "printed /late"));
}

TEST_CASE("USR1 does not disturb a runner that is not ours") {
    const TempDir dir;
    const string errors = dir.path + "/errors", old = errors + ".1";
    write_file(dir.path + "/runner.pl", R"perl(
use strict;
$| = 1;
print "0:,";
while (1) {
    my ($size, $c, $block) = ("", "", "");
    $size .= $c while read(STDIN, $c, 1) && $c ne ":";
    read(STDIN, $block, $size + 1) or exit;
    print "16:Status: 200 OK\n\n,4:here,0:,";
}
)perl");
    const Server server(
        "", {"-w", "1", "--runner", "perl " + dir.path + "/runner.pl", "--error-logfile", errors},
        {}, false);
    vector<pid_t> runners;
    REQUIRE(wait_for([&] { return (runners = server.runners()).size() == 1; }));
    const int port = port_in(read_file(errors));
    CHECK(request(port, get_bytes("/")).body == "here");
    REQUIRE(::rename(errors.c_str(), old.c_str()) == 0);
    server.signal(SIGUSR1);
    REQUIRE(wait_for([&] { return !has_open(server.worker(), old); }));
    CHECK(request(port, get_bytes("/")).body == "here");
    CHECK(server.runners() == runners);
    CHECK_FALSE(contains(read_file(errors), "[ERROR]"));
}

TEST_CASE("an access log that takes no more is told of, once; then it goes on with a line") {
    const struct rlimit more = {16384, 16384};
    const Limit files(RLIMIT_FSIZE, 8192, more.rlim_max);
    Server server(kHello, {"-w", "1"});
    for (int i = 0; i < 150; ++i) { CHECK(get(server).body == "hello\n"); }
    CHECK(server.access().size() == 8192);
    CHECK(count(server.log(), "[ERROR] cannot write the access log: File too large") == 1);
    CHECK(server.access().back() != '\n');  // the last one is torn
    REQUIRE(::prlimit(server.worker(), RLIMIT_FSIZE, &more, nullptr) == 0);
    for (int i = 0; i < 2; ++i) { CHECK(get(server).body == "hello\n"); }
    const string access = server.access().substr(8192);
    CHECK(count(access, "\n127.0.0.1 - - [") == 2);
    CHECK(count(access, "\n") == 3);
    for (int i = 0; i < 150; ++i) { CHECK(get(server).body == "hello\n"); }
    CHECK(server.access().size() == 16384);
    const string path = server.dir.path + "/access";
    REQUIRE(::rename(path.c_str(), (path + ".1").c_str()) == 0);
    server.signal(SIGUSR1);
    CHECK(wait_for([&] { return get(server).body == "hello\n" && exists(path); }));
    CHECK(wait_for([&] { return get(server).body == "hello\n" && server.access() != ""; }));
    CHECK(server.access().substr(0, 9) == "127.0.0.1");
}

TEST_CASE("with --user the logs move where only root can open them") {
    if (!may_become_and_see_others().second) {
        MESSAGE("not run: only root with CAP_SYS_PTRACE sees the processes of another user");
        return;
    }
    const TempDir dir, open;  // of mode 0700
    REQUIRE(::chmod(open.path.c_str(), 0755) == 0);
    const string sub = open.path + "/sub", access = sub + "/access", errors = dir.path + "/errors";
    REQUIRE(::mkdir(sub.c_str(), 0700) == 0);
    Server server(kTalkative,
                  {"-u", "nobody", "--access-logfile", access, "--error-logfile", errors}, {},
                  false);
    ::chmod(server.dir.path.c_str(), 0755);
    REQUIRE(wait_for([&] { return server.ready_workers() == 2; }));
    const int port = port_in(read_file(errors));
    REQUIRE(::rename(access.c_str(), (access + ".1").c_str()) == 0);
    REQUIRE(::rename(errors.c_str(), (errors + ".1").c_str()) == 0);
    server.signal(SIGUSR1);
    CHECK(wait_for([&] {
        CHECK(request(port, get_bytes("/late")).body == "ok");
        return contains(read_file(errors), "printed /late") &&
               contains(read_file(access), "GET /late");
    }));
    CHECK(count(read_file(errors), "Hang up") == 1);  // both workers wanted it
    CHECK(contains(read_file(errors + ".1"), "Permission denied: new workers inherit it"));
    CHECK_FALSE(contains(read_file(errors + ".1"), "[ERROR]"));
    REQUIRE(::rename(sub.c_str(), (sub + ".1").c_str()) == 0);  // the other log fails, too: ENOENT
    REQUIRE(::rename(errors.c_str(), (errors + ".2").c_str()) == 0);
    server.signal(SIGUSR1);
    CHECK(wait_for([&] { return count(read_file(errors), "Hang up") == 1; }));
}

TEST_CASE("workers and runners run as --user and --group, and their files belong to them") {
    if (!may_become_and_see_others().second) {
        MESSAGE("not run: only root with CAP_SYS_PTRACE sees the processes of another user");
        return;
    }
    const TempDir dir;
    ::chmod(dir.path.c_str(), 0755);
    const struct passwd nobody = *::getpwnam("nobody");
    const gid_t group = ::getgrnam("nogroup")->gr_gid;
    const string access = dir.path + "/access", errors = dir.path + "/errors",
                 path = dir.path + "/s";
    Server server(kTalkative,
                  {"-u", "nobody", "-g", "nogroup", "-b", "unix:" + path, "-m", "0027",
                   "--access-logfile", access, "--error-logfile", errors},
                  {}, false);
    ::chmod(server.dir.path.c_str(), 0755);
    REQUIRE(wait_for([&] { return server.ready_workers() == 2; }));
    const auto owner = [](const string& file) {
        struct stat info = {};
        return ::stat(file.c_str(), &info) == 0 ? std::make_pair(info.st_uid, info.st_gid)
                                                : std::make_pair(uid_t{0}, gid_t{0});
    };
    const auto expected = std::make_pair(nobody.pw_uid, group);
    const auto check_all = [&] {
        const string uid = to_string(nobody.pw_uid), gid = to_string(group), tab = "\t";
        vector<pid_t> pids = server.runners();
        for (const pid_t pid : server.workers()) { pids.push_back(pid); }
        CHECK(pids.size() == 4);
        for (const pid_t pid : pids) {
            CHECK(status_of(pid, "Uid") == uid + tab + uid + tab + uid + tab + uid);
            CHECK(status_of(pid, "Gid") == gid + tab + gid + tab + gid + tab + gid);
            CHECK(status_of(pid, "Groups") == gid);
        }
        for (const string& file : {access, errors, path}) { CHECK((owner(file) == expected)); }
        CHECK(request_unix(path, get_bytes("/x")).body == "ok");
    };
    CHECK(status_of(server.pid, "Uid").substr(0, 2) == "0\t");
    CHECK(status_of(server.pid, "Groups") == status_of(::getpid(), "Groups"));
    check_all();
    struct stat info = {};
    CHECK((::stat(path.c_str(), &info) == 0 && (info.st_mode & 0777) == 0750));
    const string beats = output_of("stat -Lc %U /proc/" + to_string(server.pid) +
                                   "/fd/* 2>/dev/null | grep -c nobody");
    CHECK(std::atoi(beats.c_str()) >= 2);  // the heartbeat files
    REQUIRE(::rename(access.c_str(), (access + ".1").c_str()) == 0);
    REQUIRE(::rename(errors.c_str(), (errors + ".1").c_str()) == 0);
    server.signal(SIGUSR1);
    CHECK(wait_for([&] { return (owner(access) == expected) && (owner(errors) == expected); }));
    CHECK(wait_for([&] {
        (void)request_unix(path, get_bytes("/late"));
        return contains(read_file(errors), "printed /late") &&
               contains(read_file(access), "GET /late");
    }));
    const vector<pid_t> before = server.workers();
    server.signal(SIGHUP);
    CHECK(wait_for([&] { return all_new(server, before, 2); }, 10s));
    check_all();
    CHECK(run_to_end({"-u", "no-such-user", "app:app"}).code == 1);
    CHECK(run_to_end({"-g", "no-such-group", "app:app"}).code == 1);
    CHECK(contains(run_to_end({"-u", "424242", "app:app"}).err, "'424242': name a group"));
    CHECK(run_to_end({"-u", "424242", "-g", "424242", "--check-config"}).code == 4);
    Server grouped(kHello, {"-g", "nogroup", "-w", "1"});
    CHECK(status_of(grouped.workers().at(0), "Uid").substr(0, 2) == "0\t");
    CHECK(status_of(grouped.workers().at(0), "Groups") == to_string(group));
    CHECK(run_to_end({"-u", "4294967296", "app:app"}).code == 1);
    CHECK(run_to_end({"-u", "4294967295", "app:app"}).code == 1);
    const string target = dir.path + "/of_root", hard = dir.path + "/hard",
                 theirs = dir.path + "/theirs", root = dir.path + "/root";
    write_file(target, "");
    REQUIRE(::link(target.c_str(), hard.c_str()) == 0);
    for (const string& made : {theirs, root}) { REQUIRE(::mkdir(made.c_str(), 0755) == 0); }
    REQUIRE(::link(target.c_str(), (theirs + "/hard").c_str()) == 0);
    REQUIRE(::chown(theirs.c_str(), nobody.pw_uid, group) == 0);
    REQUIRE(::symlink(target.c_str(), (theirs + "/link").c_str()) == 0);
    REQUIRE(::symlink(root.c_str(), (theirs + "/logs").c_str()) == 0);
    REQUIRE(::mkfifo((theirs + "/fifo").c_str(), 0666) == 0);
    REQUIRE(::symlink((theirs + "/link").c_str(), (root + "/link").c_str()) == 0);
    REQUIRE(::symlink((theirs + "/logs").c_str(), (dir.path + "/logs").c_str()) == 0);
    const struct {
        string log;
        int code;  // 4: accepted, but the application cannot be loaded
    } logs[] = {
        {theirs + "/link", 1},       {theirs + "/logs/log", 1}, {theirs + "/fifo", 1},
        {root + "/link", 1},         {theirs + "/hard", 1},     {hard, 4},
        {dir.path + "/logs/log", 1}, {theirs + "/log", 4},      {root + "/log", 4},
        {root + "//log", 4},         {root + "/./log", 4},      {dir.path + "/logs//other", 1}};
    for (const auto& row : logs) {  // what the user could lead a log to stays root's
        CAPTURE(row.log);
        for (const string option : {"--error-logfile", "--access-logfile"}) {
            const Ran ran = run_to_end({"-u", "nobody", option, row.log, "--check-config"});
            CHECK(ran.code == row.code);
        }
        CHECK((owner(target) == std::make_pair(uid_t{0}, gid_t{0})));
    }
    CHECK((owner(theirs + "/log") == expected));
    CHECK((owner(root + "/log") == expected));
    REQUIRE(::chown(root.c_str(), 0, 4) == 0);  // group adm
    REQUIRE(::chmod(root.c_str(), 0775) == 0);
    CHECK(run_to_end({"-u", "nobody", "--error-logfile", root + "/2", "--check-config"}).code == 4);
    const string closed = dir.path + "/closed";  // to the user, who keeps large bodies in it
    REQUIRE(::mkdir(closed.c_str(), 0700) == 0);
    const Ran full = run_to_end({"-u", "nobody", "--check-config"}, {"TMPDIR=" + closed});
    CHECK(full.code == 1);
    CHECK(contains(full.err, "temporary file in " + closed + ": Permission denied"));
    const string left = dir.path + "/left";
    CHECK(run_to_end({"-p", "/nonexistent/pid", "-b", "unix:" + left, "app:app"}).code == 1);
    CHECK_FALSE(exists(left));
}

TEST_CASE("a reload goes to what the name of its directory stands for by then") {
    const TempDir dir;
    const string current = dir.path + "/current", next = dir.path + "/next";
    for (const char* release : {"one", "two", "bad"}) {
        REQUIRE(::mkdir((dir.path + "/" + release).c_str(), 0755) == 0);
        write_file(dir.path + "/" + release + "/app.py",
                   kTools +
                       "def release(environ, start_response):\n    return reply("
                       "start_response, '" +
                       release + " ' + os.getcwd()[-3:])\n");
    }
    write_file(dir.path + "/bad/app.py", "no python");
    const auto point_at = [&](const char* release) {
        REQUIRE(::symlink(release, next.c_str()) == 0);
        REQUIRE(::rename(next.c_str(), current.c_str()) == 0);
    };
    for (const bool option : {true, false}) {
        CAPTURE(option);
        point_at("one");
        Server::before_exec = [&] {  // as a shell
            if (::chdir(current.c_str()) == 0) { ::setenv("PWD", current.c_str(), 1); }
        };
        Server server("", {"--chdir", option ? current : ".", "-p", "run.pid"});
        Server::before_exec = nullptr;
        CHECK(get(server, "/release").body == "one one");
        point_at("two");
        server.signal(SIGHUP);
        CHECK(wait_for([&] { return get(server, "/release").body == "two two"; }));
        point_at("bad");  // and a worker that replaces one that serves is like that
        server.signal(SIGHUP);
        CHECK(server.log_has("Reload failed"));
        const vector<pid_t> before = server.workers();
        for (const pid_t pid : before) { ::kill(pid, SIGKILL); }
        CHECK(wait_for([&] { return all_new(server, before, 2); }));
        CHECK(get(server, "/release").body == "two two");
        point_at("nowhere");
        server.signal(SIGHUP);
        CHECK(server.log_has("cannot change to " + current));
        CHECK(get(server, "/release").body == "two two");
        const string pidfile = dir.path + "/one/run.pid";
        CHECK(exists(pidfile));
        server.signal(SIGTERM);
        CHECK(server.wait_end());
        CHECK_FALSE(exists(pidfile));
    }
}

TEST_CASE("a signal sent as soon as there is a pid file is handled as at any other time") {
    const TempDir dir;
    for (const int number : {SIGQUIT, SIGTERM, SIGHUP}) {
        CAPTURE(number);
        Pair log;  // full: the server waits at its first line, with a pid file and no worker
        REQUIRE_FALSE(make_pipe(log, true));
        while (::write(log.second.get(), "x", 1) == 1) {}
        REQUIRE(::fcntl(log.second.get(), F_SETFL, 0) == 0);
        Server::before_exec = [&] { ::dup2(log.second.get(), STDERR_FILENO); };
        Server server(kHello, {"-p", dir.path + "/pid"}, {}, false);
        Server::before_exec = nullptr;
        REQUIRE(wait_for([&] { return exists(dir.path + "/pid"); }, 15s));
        server.signal(number);
        string said;
        const auto says = [&](const char* what) {
            char buffer[4096];
            const ssize_t n = ::read(log.first.get(), buffer, sizeof buffer);
            said.append(buffer, n > 0 ? static_cast<size_t>(n) : 0);
            return contains(said, what);
        };
        if (number == SIGHUP) {
            CHECK(wait_for([&] { return says("Hang up: Master"); }, 15s));
            server.signal(SIGTERM);
        }
        CHECK(wait_for([&] { return says("Shutting down: Master"); }, 15s));
        CHECK(server.wait_end());
        CHECK(server.exit_code() == 0);
        CHECK_FALSE(exists(dir.path + "/pid"));
    }
}

TEST_CASE("a server that cannot write its pid file does not start") {
    const TempDir dir;
    const Limit files(RLIMIT_FSIZE, 0);  // they can be made, but nothing can be written to them
    Server server(kHello, {"-p", dir.path + "/pid"}, {}, false);
    CHECK(server.wait_end());
    CHECK(server.exit_code() == 1);
    CHECK(output_of("ls " + dir.path).empty());
}

TEST_CASE("who puts a FIFO in the place of the pid file does not hold up a stop") {
    const TempDir dir;
    const string path = dir.path + "/pid";
    Server server(kHello, {"-w", "1", "-p", path}, {}, false);
    REQUIRE(server.wait_ready_workers(1));
    CHECK(read_file(path) == to_string(server.pid) + "\n");
    REQUIRE(::unlink(path.c_str()) == 0);
    REQUIRE(::mkfifo(path.c_str(), 0600) == 0);
    server.signal(SIGTERM);
    CHECK(server.wait_end());
    CHECK(server.exit_code() == 0);
    CHECK(exists(path));
}

TEST_CASE("a listener that comes as standard input is served, also in the background") {
    const TempDir dir;
    string port;
    const Fd listening = listen_somewhere(port);
    const string pidfile = dir.path + "/pid", log = dir.path + "/log";
    write_file(dir.path + "/app.py", kHello);
    CHECK(output_of(quoted_server() + " -D -w 1 -b fd://0 -p " + pidfile + " --chdir " + dir.path +
                    " --error-logfile " + log + " --python /usr/bin/python3 app:app 2>&1 <&" +
                    to_string(listening.get())) == "");
    REQUIRE(wait_for([&] { return contains(read_file(log), "Booting worker"); }));
    CHECK(Reply(request(std::atoi(port.c_str()), get_bytes("/"))).body == "hello\n");
    ::kill(read_pidfile(pidfile), SIGTERM);
    CHECK(wait_for([&] { return !exists(pidfile); }));
}

TEST_CASE("a daemon goes on in the background, and its pid file names it as long as it lives") {
    const TempDir dir;
    write_file(dir.path + "/app.py", kTalkative);
    const string pidfile = dir.path + "/pid", errors = dir.path + "/errors";
    vector<string> args{"-D",      "-p",          pidfile,
                        "--chdir", dir.path,      "--error-logfile",
                        errors,    "--python",    "/usr/bin/python3",
                        "-b",      "127.0.0.1:0", "app:app"};
    CHECK(run_to_end(args).code == 0);
    REQUIRE(
        wait_for([&] { return exists(pidfile) && contains(read_file(errors), "Listening at"); }));
    const pid_t pid = read_pidfile(pidfile);
    REQUIRE(pid > 1);
    const auto tree = [&] { return output_of("pgrep -P " + to_string(pid) + " | wc -l"); };
    CHECK(::getsid(pid) != ::getsid(0));
    CHECK(output_of("readlink /proc/" + to_string(pid) + "/fd/0") == "/dev/null");
    CHECK(output_of("readlink /proc/" + to_string(pid) + "/fd/1") == errors);
    CHECK(output_of("readlink /proc/" + to_string(pid) + "/cwd") == dir.path);
    CHECK(output_of("stat -c %a " + pidfile) == "644");
    const int port = port_in(read_file(errors));
    CHECK(request(port, get_bytes("/x")).body == "ok");
    CHECK(wait_for([&] { return contains(read_file(errors), "printed /x"); }));
    REQUIRE(::rename(errors.c_str(), (errors + ".1").c_str()) == 0);
    ::kill(pid, SIGUSR1);
    CHECK(wait_for([&] { return exists(errors); }));
    const string workers = "$(pgrep -d, -P " + to_string(pid) + ")";
    const string all = "for p in $(pgrep -P " + to_string(pid) + "," + workers + ") " +
                       to_string(pid) + "; do LC_ALL=C ls -l /proc/$p/fd; done";
    CHECK(wait_for([&] {  // no process holds the old one, nor will one that is to come
        const string files = output_of(all);
        return count(files, "total ") == 5 && !contains(files, errors + ".1");
    }));
    const Ran second = run_to_end(args);
    CHECK(second.code == 1);
    CHECK(contains(second.err, to_string(pid)));
    CHECK(read_pidfile(pidfile) == pid);
    CHECK(::getsid(pid) != pid);  // no session leader: it cannot get a terminal
    vector<Client> waiting;
    for (int i = 0; i < 7; ++i) {
        waiting.emplace_back(port);
        waiting.back().send(get_bytes("/slow"));
    }
    ::poll(nullptr, 0, 100);  // some run, the others wait for a runner
    ::kill(pid, SIGWINCH);
    for (Client& client : waiting) { CHECK(Reply(client.read_all()).body == "ok"); }
    CHECK(wait_for([&] { return tree() == "0"; }));
    ::kill(pid, SIGHUP);
    CHECK(wait_for([&] { return tree() == "2"; }));
    CHECK(request(port, get_bytes("/y")).body == "ok");
    ::kill(pid, SIGTERM);
    CHECK(wait_for([&] { return !alive(pid); }));
    CHECK_FALSE(exists(pidfile));
    write_file(pidfile, "999999999\n");  // of a process that is no more
    args[6] = "";                        // no error log: nothing of the terminal is kept
    CHECK(run_to_end(args).code == 0);
    REQUIRE(wait_for([&] { return read_pidfile(pidfile) != 999999999; }));
    const pid_t again = read_pidfile(pidfile);
    CHECK(output_of("readlink /proc/" + to_string(again) + "/fd/2") == "/dev/null");
    ::kill(again, SIGQUIT);
    CHECK(wait_for([&] { return !alive(again); }));
    CHECK_FALSE(exists(pidfile));
}

TEST_CASE(
    "runners are recycled: the successor first, no request fails, none waits for the change") {
    Server server(kTools + kOnce + R"py(
import atexit
time.sleep(0.5)  # so long the import takes
atexit.register(mark, "left")
)py",
                  {"--max-requests", "5", "--max-requests-jitter", "5"});
    REQUIRE(server.wait_ready_workers(2));
    const vector<pid_t> workers = server.workers(), before = server.runners();
    double slowest = 0;
    int good = 0;
    const Time end = Clock::now() + 20s;
    while (good < 1000 && Clock::now() < end) {
        vector<Client> clients;
        for (int i = 0; i < 4; ++i) { clients.emplace_back(server); }
        const Time start = Clock::now();
        for (int i = 0; i < 4; ++i) {
            clients[static_cast<size_t>(i)].send(get_bytes("/once?" + to_string(good + i)));
        }
        for (Client& client : clients) {
            REQUIRE(Reply(client.read_all(3s)).body == "ok");
            ++good;
        }
        slowest = std::max(slowest, seconds_since(start));
        ::poll(nullptr, 0, 10);  // so that some generations pass
    }
    CHECK(good == 1000);
    CHECK(slowest < 0.4);  // an import takes longer
    CHECK(runs_of(server).size() == 1000);
    CHECK(server.workers() == workers);
    const size_t recycled = count(server.log(), "Autorestarting runner (pid:");
    CHECK(recycled >= 6);
    CHECK(wait_for([&] {
        return server.runners().size() == 2 &&
               read_file(server.dir.path + "/left").size() >= recycled - 1;
    }));
    for (const pid_t pid : server.runners()) { CHECK(!has_pid(before, pid)); }
    CHECK_FALSE(contains(server.log(), "[ERROR]"));

    write_file(server.dir.path + "/app.py", "no python\n");  // the old ones go on
    for (int i = 0; i < 40; ++i) {
        CHECK(get(server, "/once?late" + to_string(i)).body == "ok");
        ::poll(nullptr, 0, 20);
    }
    CHECK(server.log_has("SyntaxError"));
    CHECK(get(server, "/once?last").body == "ok");
    CHECK(server.workers() == workers);
}

TEST_CASE("a runner that has been succeeded and does not end well is told of") {
    const std::pair<string, string> rows[] = {
        {"os._exit(5)", "exited with status 5"},
        {"time.sleep(60)", "was ended by signal 9 (Killed), sent by this server"}};
    for (const auto& [at_exit, told] : rows) {
        Server server(kTools + "import atexit\natexit.register(lambda: " + at_exit + ")\n",
                      {"-w", "1", "--max-requests", "1", "--graceful-timeout", "1"});
        const vector<pid_t> runners = server.runners();
        REQUIRE(runners.size() == 1);
        CHECK(get(server, "/hello").body == "hello");
        CHECK(server.log_has("Runner (pid:" + to_string(runners[0]) + ") " + told));
    }
}

// --- threads --------------------------------------------------------------------------------

/// For applications that run in several threads: some wait for each other, some go on and on.
const string kThreads = kTools + kOnce + R"py(
import atexit, hashlib
atexit.register(mark, "left")
barrier = threading.Barrier(4)

def meet(environ, start_response):
    barrier.wait(5)
    return reply(start_response, environ["wsgi.multithread"])

def stay(environ, start_response):  # until its own gate opens
    name = environ["QUERY_STRING"]
    mark("at_" + name)
    wait("go_" + name)
    return reply(start_response, name)

def hang(environ, start_response):
    mark("hung")
    time.sleep(60)

def quit(environ, start_response):
    sys.exit("the application quits")

def stream(environ, start_response):
    data = environ["QUERY_STRING"].encode()
    start_response("200 OK", [])
    for i in range(50):
        yield data * 100

def digest(environ, start_response):
    data = environ["wsgi.input"].read()
    return reply(start_response, hashlib.sha1(data).hexdigest() + str(len(data)))

def page(environ, start_response):
    return reply(start_response, environ["QUERY_STRING"] * 5000)
)py";

/// Lets the requests of stay() that have these names answer.
void let_go(const Server& server, const vector<string>& names) {
    for (const string& name : names) { write_file(server.dir.path + "/go_" + name, ""); }
}

/// Starts requests of stay() with these names, and waits until all run.
vector<Client> start_stays(const Server& server, const vector<string>& names) {
    vector<Client> clients;
    for (const string& name : names) {
        clients.emplace_back(server);
        clients.back().send(get_bytes("/stay?" + name));
        REQUIRE(wait_file(server, "at_" + name));
    }
    return clients;
}

TEST_CASE("with --threads as many requests run at a time in one runner, and others wait") {
    Server server(kThreads, {"-w", "1", "--threads", "4"});
    CHECK(server.log_has("Using worker: gthread\n"));
    CHECK(server.runners().size() == 1);
    for (int round = 0; round < 3; ++round) {
        vector<Client> four = hold(server, 4, get_bytes("/meet"));
        for (Client& client : four) { CHECK(Reply(client.read_all()).body == "True"); }
    }
    vector<Client> busy = start_stays(server, {"a", "b", "c", "d"});
    Client fifth(server);
    fifth.send(get_bytes("/stay?e"));
    CHECK_FALSE(fifth.readable(300ms));
    CHECK_FALSE(wait_for([&] { return exists(server.dir.path + "/at_e"); }, 100ms));
    let_go(server, {"c"});
    CHECK(Reply(busy[2].read_all()).body == "c");
    CHECK(wait_file(server, "at_e"));  // in the slot that has become free
    let_go(server, {"a", "b", "d", "e"});
    CHECK(Reply(fifth.read_all()).body == "e");
    for (const size_t i : {0U, 1U, 3U}) { CHECK(Reply(busy[i].read_all()).status == 200); }
    CHECK_FALSE(contains(server.log(), "[ERROR]"));
}

TEST_CASE("-k gthread with one thread is the same as sync") {
    const Server server(kTools +
                            "\ndef threads(environ, start_response):\n"
                            "    return reply(start_response, '%s %d' % "
                            "(environ['wsgi.multithread'], threading.active_count()))\n",
                        {"-w", "1", "-k", "gthread"});
    CHECK(server.log_has("Using worker: gthread\n"));
    CHECK(get(server, "/threads").body == "False 1");
}

TEST_CASE("responses and bodies of many threads never mix, and no descriptor is lost") {
    raise_descriptors();
    Server server(kThreads + kHold, {"-w", "2", "--threads", "4"});
    REQUIRE(server.wait_ready_workers(2));
    const auto descriptors = [&] {
        string counts;
        for (const pid_t pid : processes_with(server.mark)) {
            counts += output_of("ls /proc/" + to_string(pid) + "/fd | wc -l") + " ";
        }
        return counts;
    };
    CHECK(answered(server, 20) == 20);
    const string before = descriptors();
    for (size_t round = 0; round < 3; ++round) {
        vector<Client> clients;
        vector<string> expected;
        for (size_t i = 0; i < 200; ++i) {
            const string id = "<" + to_string(round * 1000 + i) + ">";
            clients.emplace_back(server);
            if (i % 4 == 0) {
                const size_t size = i % 8 == 0 ? i * 2000 : i;
                const string body(size, static_cast<char>('a' + i % 26));
                write_file(server.dir.path + "/body", body);
                CHECK(clients.back().send(sized("POST /digest", body)));
                expected.push_back(
                    output_of("sha1sum < " + server.dir.path + "/body | cut -c1-40") +
                    to_string(size));
                continue;
            }
            const string kind = i % 4 == 1 ? "page" : i % 4 == 2 ? "stream" : "once";
            clients.back().send(get_bytes("/" + kind + "?" + id));
            expected.emplace_back(kind == "once" ? "ok" : "");
            for (int n = 0; n < 5000 && kind != "once"; ++n) { expected.back() += id; }
        }
        for (size_t i = 0; i < clients.size(); ++i) {
            const Reply reply(clients[i].read_all());
            CHECK(reply.status == 200);
            CHECK(reply.whole);
            CHECK((reply.body == expected[i]));
        }
    }
    const map<string, int> runs = runs_of(server);
    CHECK(runs.size() == 150);
    for (int i = 0; i < 4; ++i) {  // a body whose last byte makes it go to a file
        Client client(server);
        client.send(sized("POST /digest", string(65537, 'x')).substr(0, 65536));
        ::poll(nullptr, 0, 50);
        client.send(string(200, 'x'));
        CHECK(contains(Reply(client.read_all()).body, "65537"));
    }
    for (const auto& each : runs) { CHECK(each.second == 1); }
    CHECK_MESSAGE(wait_for([&] { return descriptors() == before; }),
                  (before + "→ " + descriptors()));
    CHECK_FALSE(contains(server.log(), "[ERROR]"));
}

TEST_CASE("requests that take about a millisecond run once each in threads, too") {
    Server server(kThreads, {"-w", "2", "--threads", "3"});
    REQUIRE(server.wait_ready_workers(2));
    const Time end = Clock::now() + 1500ms;
    map<string, int> answers = load(server, 16, "/jitter?id=", [&] { return Clock::now() < end; });
    CHECK_MESSAGE(answers.size() == 1, show_answers(answers));
    const map<string, int> runs = runs_of(server);
    CHECK(static_cast<int>(runs.size()) == answers["200 ok"]);
    for (const auto& each : runs) { CHECK(each.second == 1); }
    CHECK_FALSE(contains(server.log(), "[ERROR]"));
}

TEST_CASE("a hung slot costs the runner; what runs in other slots has the timeout to end") {
    Server server(kThreads, {"-w", "1", "--threads", "4", "-t", "2"});
    const pid_t runner = server.runner();
    const Time start = Clock::now();
    Client hung(server), endless(server);
    hung.send(get_bytes("/hang?q=1"));
    REQUIRE(wait_file(server, "hung"));
    endless.send(get_bytes("/endless"));
    ::poll(nullptr, 0, 1000);
    vector<Client> others = start_stays(server, {"late", "never"});
    CHECK(Reply(hung.read_all()).status == 504);
    CHECK(seconds_since(start) < 2.4);
    CHECK(get(server, "/hello", 1s).body == "hello");  // not by this runner any more
    CHECK(alive(runner));
    CHECK(wait_for([&] { return seconds_since(start) > 2.8; }));
    let_go(server, {"late"});
    CHECK(Reply(others[0].read_all()).body == "late");
    CHECK(Reply(others[1].read_all()).status == 504);
    CHECK(seconds_since(start) < 3.6);
    const Reply cut(endless.read_all());
    CHECK(cut.status == 200);
    CHECK_FALSE(cut.whole);
    CHECK(seconds_since(start) > 3.8);
    CHECK(seconds_since(start) < 5);
    const string log = server.log();
    CAPTURE(log);
    CHECK(contains(log, "WORKER TIMEOUT (pid:" + to_string(runner) +
                            "): no answer for 2 s: GET /hang?q=1 HTTP/1.1"));
    CHECK(contains(log, "no answer for 2 s: GET /stay?never HTTP/1.1"));
    CHECK(count(log, "WORKER TIMEOUT") == 2);
    CHECK(contains(log, "in hang\n"));
    CHECK(contains(log, "(Aborted), sent by this server: GET /endless HTTP/1.1\n"));
    CHECK_FALSE(contains(log, "GET /stay?late"));
    CHECK(server.runners().size() == 1);
    CHECK_FALSE(has_pid(server.runners(), runner));
    CHECK(count(log, "Booting worker") == 1);
    CHECK_FALSE(contains(log, "502 to"));
}

TEST_CASE("a hung slot alone in its runner gets its 504 and SIGABRT at once, as do two together") {
    Server server(kThreads, {"-w", "1", "--threads", "2", "-t", "1"});
    for (const size_t n : {1U, 2U}) {
        const Time start = Clock::now();
        vector<Client> hung = hold(server, n, get_bytes("/hang"));
        for (Client& client : hung) { CHECK(Reply(client.read_all()).status == 504); }
        CHECK(seconds_since(start) < 1.4);
        CHECK(get(server, "/hello").body == "hello");
        CHECK(seconds_since(start) < 2);
    }
    CHECK(count(server.log(), "WORKER TIMEOUT") == 3);
    CHECK(count(server.log(), "(Aborted), sent by this server") == 2);
}

TEST_CASE("kill -9 of a runner with three requests: three 502, and the log names each") {
    Server server(kThreads, {"-w", "1", "--threads", "4"});
    const pid_t runner = server.runner();
    vector<Client> three = start_stays(server, {"a", "b", "c"});
    ::kill(runner, SIGKILL);
    for (Client& client : three) { CHECK(Reply(client.read_all()).status == 502); }
    CHECK(
        server.log_has("was ended by signal 9 (Killed): GET /stay?a HTTP/1.1, GET /stay?b "
                       "HTTP/1.1, GET /stay?c HTTP/1.1\n"));
    for (const string name : {"a", "b", "c"}) {
        CHECK(server.log_has("the runner died: GET /stay?" + name + " HTTP/1.1"));
        CHECK(server.access_has("GET /stay?" + name + " HTTP/1.1\" 502 "));
    }
    CHECK(get(server, "/hello").body == "hello");
}

TEST_CASE("runners with threads that are killed at any moment run no request twice") {
    Server server(kThreads, {"-w", "2", "--threads", "3"});
    REQUIRE(server.wait_ready_workers(2));
    const int kills = 10;
    map<string, int> answers = load_and_kill(server, "/jitter?id=", kills, 200, 60);
    CAPTURE(server.log());
    CAPTURE(show_answers(answers));
    const int good = answers["200 ok"], bad = answers["502 502 Bad Gateway\n"];
    CHECK(answers.size() == 2);
    CHECK(good > 100);
    CHECK(bad <= kills * 4);  // three run, and one may have been read ahead
    for (const auto& each : runs_of(server)) { CHECK(each.second == 1); }
}

TEST_CASE("a graceful stop finishes what runs in all threads, and atexit handlers run once") {
    Server server(kThreads, {"-w", "1", "--threads", "4"});
    vector<Client> four = start_stays(server, {"a", "b", "c", "d"});
    Client fifth(server);
    fifth.send(get_bytes("/hello"));
    server.signal(SIGTERM);
    CHECK(server.log_has("Handling signal: term"));
    CHECK_FALSE(server.wait_end(200ms));
    let_go(server, {"d", "b", "a", "c"});
    for (Client& client : four) { CHECK(Reply(client.read_all()).status == 200); }
    CHECK(Reply(fifth.read_all()).body == "hello");
    REQUIRE(server.wait_end());
    CHECK(server.exit_code() == 0);
    CHECK(read_file(server.dir.path + "/left") == "x");
    CHECK_FALSE(contains(server.log(), "[ERROR]"));
    CHECK_FALSE(contains(server.log(), "Traceback"));
}

TEST_CASE("with threads, what forks at the end has no trouble with signals") {
    Server server(R"py(
import atexit, os

def fork():
    os.waitpid(os.fork() or os._exit(0), 0)

def app(environ, start_response):
    start_response("200 OK", [])
    return [b"ok"]

atexit.register(fork)
)py",
                  {"-w", "1", "--threads", "2"});
    CHECK(get(server).body == "ok");
    server.signal(SIGTERM);
    REQUIRE(server.wait_end());
    CHECK_FALSE(contains(server.log(), "Exception ignored"));
}

TEST_CASE(
    "with threads, SIGQUIT ends all within a second, and a client that leaves frees its slot") {
    Server server(kThreads, {"-w", "1", "--threads", "2"});
    vector<Client> two = start_stays(server, {"a", "b"});
    two[0].reset();
    CHECK(server.access_has("GET /stay?a HTTP/1.1\" 499 "));
    let_go(server, {"a"});
    CHECK(get(server, "/hello").body == "hello");
    const Time start = Clock::now();
    server.signal(SIGQUIT);
    REQUIRE(server.wait_end());
    CHECK(wait_for([&] { return processes_with(server.mark).empty(); }));
    CHECK(seconds_since(start) < 1.2);
}

TEST_CASE("sys.exit() of the application costs other threads nothing, whichever it runs in") {
    Server server(kThreads, {"-w", "1", "--threads", "2"});
    vector<Client> first = start_stays(server, {"a"});
    CHECK(get(server, "/quit").status == 500);
    CHECK(server.log_has("SystemExit: the application quits"));
    CHECK(get(server, "/hello").body == "hello");  // the thread goes on
    vector<Client> second = start_stays(server, {"b"});
    let_go(server, {"a"});
    CHECK(Reply(first[0].read_all()).body == "a");
    CHECK(get(server, "/quit").status == 500);  // in the main thread
    CHECK(get(server, "/hello").body == "hello");
    let_go(server, {"b"});
    CHECK(Reply(second[0].read_all()).body == "b");
    CHECK_FALSE(contains(server.log(), "exited with status"));
}

TEST_CASE("sys.exit() ends a child of the application with its status, with --threads too") {
    Server server(kThreads + R"py(
def child(environ, start_response):
    pid = os.fork()
    if pid == 0:
        sys.exit(3)
    return reply(start_response, os.waitpid(pid, 0)[1] >> 8)
)py",
                  {"-w", "1", "--threads", "2"});
    CHECK(get(server, "/child").body == "3");
    CHECK_FALSE(contains(server.log(), "SystemExit"));
}

TEST_CASE("sys.exit() of the application ends a runner without threads, as ever") {
    Server server(kThreads, {"-w", "1"});
    CHECK(get(server, "/quit").status == 502);
    CHECK(server.log_has("exited with status 1: GET /quit HTTP/1.1"));
    CHECK(get(server, "/hello").body == "hello");
}

TEST_CASE("sys.exit() in close() of a response takes no thread away") {
    Server server(kThreads + R"py(
class Exits:
    def __iter__(self):
        return iter([b"ok"])
    def close(self):
        sys.exit("closed")
def exits(environ, start_response):
    start_response("200 OK", [("Content-Length", "2")])
    return Exits()
)py",
                  {"-w", "1", "--threads", "2", "-t", "3"});
    vector<Client> first = start_stays(server, {"first"});  // in the slot of the main thread
    CHECK(get(server, "/exits").body == "ok");
    CHECK(server.log_has("SystemExit: closed"));
    vector<Client> second = start_stays(server, {"second"});
    let_go(server, {"first", "second"});
    CHECK(Reply(first[0].read_all()).body == "first");
    CHECK(Reply(second[0].read_all()).body == "second");
}

TEST_CASE("runners with threads are recycled: nothing fails, nothing waits for a long request") {
    Server server(kThreads, {"-w", "1", "--threads", "4", "--max-requests", "20"});
    const pid_t first = server.runner();
    vector<Client> slow = start_stays(server, {"slow"});  // while the successor takes over
    int good = 0;
    for (const auto& each : load(server, 4, "/once?id=", [&] { return ++good < 400; })) {
        CHECK_MESSAGE(each.first == "200 ok", each.first);
    }
    CHECK(server.log_has("Autorestarting runner (pid:" + to_string(first) + ")"));
    CHECK(wait_for([&] { return server.runners().size() == 2; }));
    CHECK(count(server.log(), "Autorestarting") == 1);  // two at a time, not more
    CHECK_FALSE(exists(server.dir.path + "/left"));
    let_go(server, {"slow"});
    CHECK(Reply(slow[0].read_all()).body == "slow");
    CHECK(wait_file(server, "left"));  // as any Python program leaves
    const Time start = Clock::now();
    map<string, int> answers = load(server, 4, "/hello", [&] {
        return count(server.log(), "Autorestarting") <= 2 && seconds_since(start) < 10;
    });
    CHECK_MESSAGE(answers.size() == 1, show_answers(answers));
    CHECK(count(server.log(), "Autorestarting") > 2);
    CHECK(wait_for([&] { return server.runners().size() == 1; }));
    for (const auto& each : runs_of(server)) { CHECK(each.second == 1); }
    CHECK_FALSE(contains(server.log(), "[ERROR]"));
}

TEST_CASE(
    "a child that a thread forks has no part in the bridge, and prints go where they should") {
    Server server(kTools + R"py(

def fork(environ, start_response):
    pid = os.fork()
    if pid == 0:  # whose writes to any descriptor would be seen
        for fd in range(3, 1024):
            try:
                os.write(fd, b"5:wrong,")
            except OSError:
                pass
        os._exit(0)
    os.waitpid(pid, 0)
    print("printed by", threading.current_thread() is threading.main_thread())
    mark("forked")
    wait("go")
    return reply(start_response, "forked")
)py",
                  {"-w", "1", "--threads", "3"});
    vector<Client> clients;
    for (size_t i = 0; i < 3; ++i) {
        clients.emplace_back(server);
        clients.back().send(get_bytes("/fork"));
        REQUIRE(wait_file(server, "forked", i + 1));
    }
    open_gate(server);
    for (Client& client : clients) { CHECK(Reply(client.read_all()).body == "forked"); }
    CHECK(count(server.log(), "printed by True\n") == 1);
    CHECK(count(server.log(), "printed by False\n") == 2);
    CHECK_FALSE(contains(server.log(), "protocol"));
}

TEST_CASE("the most threads, and how many connections and descriptors are left beside them") {
    raise_descriptors();
    const auto start = [](rlim_t descriptors, const string& threads) {
        const Limit limit(RLIMIT_NOFILE, descriptors);
        return std::make_unique<Server>(
            kThreads, vector<string>{"-w", "1", "--threads", threads, "--max-requests", "300"},
            vector<string>{}, false);
    };
    const struct {
        rlim_t descriptors;
        const char* threads;
        size_t uploads, together;  // more uploads than fit, with a file each; clients at a time
    } rows[] = {
        {256, "8", 0, 150}, {4096, "128", 0, 150}, {300, "16", 36, 15}, {2048, "128", 470, 15}};
    for (const auto& row : rows) {
        CAPTURE(row.descriptors);
        const auto server = start(row.descriptors, row.threads);
        REQUIRE_MESSAGE(server->wait_ready_workers(1), server->log());
        CHECK(server->log_has("--worker-connections lowered from 1000 to "));
        const vector<Client> held =
            hold(*server, row.uploads,
                 "POST /once HTTP/1.1\r\nContent-Length: 90000\r\n\r\n" + string(80000, 'x'));
        for (size_t sent = 0; sent < 450; sent += row.together) {  // into the time of a successor
            vector<Client> clients = hold(*server, row.together, get_bytes("/once"));
            for (Client& client : clients) { CHECK(Reply(client.read_all()).body == "ok"); }
        }
        CHECK(server->log_has("Autorestarting"));
        const string log = server->log();  // uploads may have to go for the others, and only they
        CHECK(count(log, "[ERROR]") ==
              count(log, "503 to 127.0.0.1: too many connections: POST /once"));
    }
    const auto server = start(256, "64");
    CHECK(server->wait_end());
    CHECK(server->exit_code() == 1);
    CHECK(server->log() == "Error: too few descriptors for so many --threads\n");
}

/// The masters that an upgrade of this server has started.
vector<pid_t> masters_of(const Server& server) {
    vector<pid_t> found;
    for (const pid_t pid : server.children(server.pid)) {
        if (contains(read_file("/proc/" + to_string(pid) + "/cmdline"), ": master [")) {
            found.push_back(pid);
        }
    }
    return found;
}

TEST_CASE("with --threads ps shows what runs, not what ran") {
    const Server server(kTools + R"py(
def first(environ, start_response):
    wait("go")
    return reply(start_response, "first")

def second(environ, start_response):
    wait("second")
    return reply(start_response, "second")
)py",
                        {"-w", "1", "--threads", "2"});
    const pid_t worker = server.worker();
    const auto title = [&] { return output_of("ps -o args= -p " + to_string(worker)); };
    const auto shows = [&](const string& text) {
        return wait_for([&] { return contains(title(), text); });
    };
    Client first(server), second(server);
    freeze(worker);  // so that both begin at once
    first.send(get_bytes("/first"));
    second.send(get_bytes("/second"));
    ::kill(worker, SIGCONT);
    REQUIRE(shows("GET /"));
    const bool later = contains(title(), "GET /second");  // which of them is shown
    write_file(server.dir.path + (later ? "/second" : "/go"), "");
    CHECK(Reply((later ? second : first).read_all()).body == (later ? "second" : "first"));
    CHECK(shows(later ? "GET /first" : "GET /second"));
    write_file(server.dir.path + (later ? "/go" : "/second"), "");
    CHECK(Reply((later ? first : second).read_all()).status == 200);
    CHECK(shows("idle"));
}

/// The one that there is, in the end: a worker just forked has its master's title for a moment, and
/// a new master none while it executes the program.
pid_t heir_of(const Server& server) {
    vector<pid_t> found;
    REQUIRE(wait_for([&] { return (found = masters_of(server)).size() == 1; }));
    return found[0];
}

TEST_CASE("ps tells masters from workers, and what a worker is at; the environment is untouched") {
    const Server server(kTools, {"-w", "1", "-n", "mysite"});
    const auto shown = [](pid_t pid) { return output_of("ps -o args= -p " + to_string(pid)); };
    const auto file = [](pid_t pid, const char* name) {
        return read_file("/proc/" + to_string(pid) + "/" + name);
    };
    const pid_t worker = server.worker(), runner = server.runner();
    CHECK(wait_for([&] { return shown(worker) == "server: worker [mysite] idle"; }));
    CHECK(shown(server.pid) == "server: master [mysite]");
    CHECK(contains(shown(runner), "server: runner [mysite]"));
    CHECK(file(server.pid, "comm") == "server: master \n");
    CHECK(file(worker, "comm") == "server: worker \n");
    const string added = "SERVER_SOFTWARE=server/" + string(kVersion) + '\0';
    string theirs = file(runner, "environ");
    REQUIRE(contains(theirs, added));
    CHECK(file(worker, "environ") == theirs.erase(theirs.find(added), added.size()));
    CHECK(contains(file(worker, "environ"), server.mark));
    Client client(server);
    client.send("GET /gate?password=x#y HTTP/1.1\r\n\r\n");
    CHECK(wait_for([&] { return shown(worker) == "server: worker [mysite] GET /gate"; }));
    write_file(server.dir.path + "/go", "");
    CHECK(Reply(client.read_all()).body == "through");
    CHECK(wait_for([&] { return shown(worker) == "server: worker [mysite] idle"; }));
    ::unlink((server.dir.path + "/go").c_str());
    Client leaves(server);
    leaves.send("GET /gate?again HTTP/1.1\r\n\r\n");
    CHECK(wait_for([&] { return shown(worker) == "server: worker [mysite] GET /gate"; }));
    leaves.reset();
    CHECK(server.access_has(" 499 "));
    get(server, "/none", 100ms);  // which waits
    CHECK(shown(worker) == "server: worker [mysite] GET /gate");
    write_file(server.dir.path + "/go", "");
    CHECK(wait_for([&] { return shown(worker) == "server: worker [mysite] idle"; }));
    const Server plain(kHello, {"-w", "1", "-e", "LONG=" + string(500, 'x')});
    CHECK(wait_for([&] { return shown(plain.pid) == "server: master [app:app]"; }));
}

TEST_CASE("USR2 starts a new master beside the old: either may stop, and the other serves") {
    const TempDir dir;
    const string pidfile = dir.path + "/pid", path = dir.path + "/s";
    Server server(kHello, {"-p", pidfile, "-b", "unix:" + path, "-b", "127.0.0.1:0"});
    const auto upgrade = [&] {
        server.signal(SIGUSR2);
        REQUIRE(wait_for([&] { return exists(pidfile + ".2"); }));
        const pid_t heir = read_pidfile(pidfile + ".2");
        REQUIRE(wait_for([&] { return server.ready_workers(heir) == 2; }));
        CHECK(masters_of(server) == vector<pid_t>{heir});
        return heir;
    };
    const auto serves = [&] {
        CHECK(exchange(Client(path), get_bytes("/")).body == "hello\n");
        CHECK(request(server.port(), get_bytes("/")).body == "hello\n");
    };
    const pid_t first = upgrade();
    CHECK(read_pidfile(pidfile) == server.pid);
    server.signal(SIGUSR2);  // one at a time, and not from the new one
    ::kill(first, SIGUSR2);
    CHECK(wait_for([&] { return count(server.log(), "No upgrade: one goes on already") == 2; }));
    serves();
    ::kill(first, SIGTERM);  // back
    CHECK(server.log_has("The new master (pid:" + to_string(first) + ") exited with status 0"));
    CHECK_FALSE(exists(pidfile + ".2"));
    CHECK(exists(path));
    serves();

    const vector<pid_t> workers = server.workers();
    CHECK(workers.size() == 2);
    write_file(server.dir.path + "/app.py", "no python\n");
    server.signal(SIGUSR2);
    CHECK(wait_for([&] { return count(server.log(), "The new master (pid:") == 2; }));
    CHECK_MESSAGE(wait_for([&] { return server.workers() == workers; }), server.log());
    CHECK(exists(path));
    serves();

    write_file(server.dir.path + "/app.py", kHello);
    const pid_t second = upgrade();
    Client half(server);
    half.send("GET / HT");
    CHECK(wait_for([&] { return alive(second); }));
    server.signal(SIGTERM);
    half.send("TP/1.0\r\n\r\n");
    CHECK(Reply(half.read_all()).body == "hello\n");
    CHECK(server.wait_end());
    CHECK(server.log_has("Master has been promoted."));
    CHECK(wait_for([&] { return read_pidfile(pidfile) == second; }));
    CHECK_FALSE(exists(pidfile + ".2"));
    serves();
    ::kill(second, SIGUSR2);  // and so on
    REQUIRE(wait_for([&] { return exists(pidfile + ".2"); }));
    const pid_t third = read_pidfile(pidfile + ".2");
    REQUIRE(wait_for([&] { return server.ready_workers(third) == 2; }));
    ::kill(second, SIGKILL);
    CHECK(wait_for([&] { return read_pidfile(pidfile) == third; }));
    serves();
    CHECK(ends_by_term(third));
    CHECK_FALSE(exists(pidfile));
    CHECK_FALSE(exists(path));
}

TEST_CASE("a daemon outlives the terminal, even if that closes as soon as the command returns") {
    const TempDir dir;
    write_file(dir.path + "/app.py", kHello);
    const string pidfile = dir.path + "/pid", path = dir.path + "/socket";
    for (int i = 0; i < 3; ++i) {  // of three, one at least was lost
        output_of("script -qec 'exec \"" + server_path() + "\" -D -p " + pidfile + " --chdir " +
                  dir.path + " -b unix:" + path +
                  " --python /usr/bin/python3 app:app' /dev/null </dev/null");
        REQUIRE(wait_for([&] { return exists(pidfile); }));
        CHECK(exchange(Client(path), get_bytes("/")).body == "hello\n");
        CHECK(ends_by_term(read_pidfile(pidfile)));
    }
}

TEST_CASE("a daemon upgrades to a daemon") {
    const TempDir dir;
    write_file(dir.path + "/app.py", kHello);
    const string pidfile = dir.path + "/pid", log = dir.path + "/log";
    CHECK(run_to_end({"-D", "-p", pidfile, "--chdir", dir.path, "--error-logfile", log, "--python",
                      "/usr/bin/python3", "-b", "127.0.0.1:0", "app:app"})
              .code == 0);
    REQUIRE(wait_for([&] { return contains(read_file(log), "Listening at"); }));
    const pid_t old = read_pidfile(pidfile);
    ::kill(old, SIGUSR2);
    REQUIRE(wait_for([&] { return exists(pidfile + ".2"); }));
    const pid_t heir = read_pidfile(pidfile + ".2");
    CHECK(parent_and_state(heir).first == old);  // which waits for it, should it fail
    ::kill(old, SIGWINCH);
    const auto children = [](pid_t pid) {
        return output_of("pgrep -P " + to_string(pid) + " | wc -l");
    };
    CHECK(wait_for([&] { return children(old) == "1"; }));  // the new master alone
    ::kill(old, SIGHUP);
    CHECK(wait_for([&] { return children(old) == "3"; }));
    ::kill(old, SIGTERM);
    CHECK(wait_for([&] { return !alive(old) && read_pidfile(pidfile) == heir; }));
    CHECK(children(heir) == "2");
    CHECK(ends_by_term(heir));
    CHECK_FALSE(exists(pidfile));
}

TEST_CASE("workers that WINCH has stopped leave requests to those of a reload") {
    const TempDir dir;
    write_file(dir.path + "/app.py", kTools + R"py(
def slow(environ, start_response):
    mark("at_slow")
    wait("slow_goes_on")
    return reply(start_response, "slow")
)py");
    const string pidfile = dir.path + "/pid", log = dir.path + "/log", path = dir.path + "/s";
    CHECK(run_to_end({"-D", "-p", pidfile, "--chdir", dir.path, "--error-logfile", log, "--python",
                      "/usr/bin/python3", "-b", "unix:" + path, "-w", "1", "--graceful-timeout",
                      "2", "app:app"})
              .code == 0);
    REQUIRE(wait_for([&] { return exists(pidfile) && exists(path); }));
    const pid_t master = read_pidfile(pidfile);
    const auto ask = [&path](const string& target) {
        Client client(path);
        client.send(get_bytes(target));
        return client;
    };
    Client hanging = ask("/gate");  // until the old worker gives up
    REQUIRE(wait_for([&] { return exists(dir.path + "/at_gate"); }));
    ::kill(master, SIGWINCH);
    REQUIRE(wait_for([&] { return contains(read_file(log), "signal: winch"); }));
    ::kill(master, SIGHUP);
    CHECK(Reply(ask("/hello").read_all()).body == "hello");
    REQUIRE(wait_for([&] { return contains(read_file(log), "Worker exiting"); }));
    Client slow = ask("/slow");
    REQUIRE(wait_for([&] { return exists(dir.path + "/at_slow"); }));
    vector<Client> waiting;  // in the queue, for the new worker
    for (int i = 0; i < 5; ++i) { waiting.push_back(ask("/hello")); }
    CHECK(Reply(hanging.read_all()).status == 503);
    write_file(dir.path + "/slow_goes_on", "");
    CHECK(Reply(slow.read_all()).body == "slow");
    for (Client& each : waiting) { CHECK(Reply(each.read_all()).body == "hello"); }
    CHECK(ends_by_term(master));
}

TEST_CASE("USR2 and TERM at once: the new master takes over") {
    Server server(kHello, {"-w", "1"});
    freeze(server.pid);
    server.signal(SIGTERM);
    server.signal(SIGUSR2);
    server.signal(SIGCONT);
    REQUIRE(server.log_has("Handling signal: usr2"));
    const string log = server.log();
    CHECK(log.find("Handling signal: usr2") < log.find("Handling signal: term"));
    CHECK(server.wait_end());
    CHECK(server.log_has("Master has been promoted."));
    CHECK(wait_for([&] { return get(server, "/", 1s).body == "hello\n"; }));
    vector<pid_t> heirs;  // whose parent has gone
    for (const pid_t pid : processes_with(server.mark)) {
        if (contains(read_file("/proc/" + to_string(pid) + "/cmdline"), "master")) {
            heirs.push_back(pid);
        }
    }
    REQUIRE(heirs.size() == 1);
    CHECK(ends_by_term(heirs[0]));
}

TEST_CASE("a new master that runs for the first time when the old one has gone is an heir, too") {
    Server server(kHello, {"-w", "1"});
    if (::ptrace(PTRACE_SEIZE, server.pid, nullptr, PTRACE_O_TRACEFORK) < 0) {
        MESSAGE("not run: processes may not be traced");
        return;
    }
    server.signal(SIGUSR2);
    int status = 0;
    const auto forks = [&] {
        if (::waitpid(server.pid, &status, WNOHANG) != server.pid) { return false; }
        if (status >> 16 == PTRACE_EVENT_FORK) { return true; }
        ::ptrace(PTRACE_CONT, server.pid, nullptr, WSTOPSIG(status));  // with the signal
        return false;
    };
    REQUIRE(wait_for(forks));
    unsigned long heir = 0;
    REQUIRE(::ptrace(PTRACE_GETEVENTMSG, server.pid, nullptr, &heir) == 0);
    const pid_t pid = static_cast<pid_t>(heir);
    REQUIRE(::waitpid(pid, &status, __WALL) == pid);  // it stands before its first instruction
    ::ptrace(PTRACE_DETACH, server.pid, nullptr, nullptr);
    server.signal(SIGTERM);
    CHECK(server.wait_end());
    ::ptrace(PTRACE_DETACH, pid, nullptr, nullptr);
    CHECK(server.log_has("Master has been promoted."));
    CHECK(wait_for([&] { return get(server, "/", 1s).body == "hello\n"; }));
    CHECK(ends_by_term(pid));
}

TEST_CASE(
    "a new master that reads its settings when the old one has gone is an heir all the same") {
    const TempDir dir;
    const string pidfile = dir.path + "/pid", path = dir.path + "/s", slow = dir.path + "/server";
    write_file(dir.path + "/app.py", kHello);
    write_file(
        slow,
        "#!/bin/bash\nif [ -n \"$SERVER_UPGRADE\" ]; then\n"
        "while grep -q '^State:.[^Z]' /proc/$SERVER_UPGRADE/status 2>/dev/null; do :; done; fi\n"
        "exec -a \"$0\" " +
            quoted_server() + " \"$@\"\n");
    ::chmod(slow.c_str(), 0755);
    output_of(slow + " -D -w 1 --python /usr/bin/python3 -p " + pidfile + " -b unix:" + path +
              " --chdir " + dir.path + " --error-logfile " + dir.path + "/log app:app");
    REQUIRE(wait_for([&] { return contains(read_file(dir.path + "/log"), "Booting worker"); }));
    const pid_t old = read_pidfile(pidfile);
    freeze(old);
    for (const int number : {SIGUSR2, SIGTERM, SIGCONT}) { ::kill(old, number); }
    CHECK(wait_for([&] { return read_pidfile(pidfile) != old && read_pidfile(pidfile) > 0; }));
    const pid_t heir = read_pidfile(pidfile);
    REQUIRE(heir > 0);
    CHECK_FALSE(exists(pidfile + ".2"));
    CHECK(exchange(Client(path), get_bytes("/")).body == "hello\n");
    CHECK(ends_by_term(heir));
    CHECK_FALSE(exists(pidfile));
    CHECK_FALSE(exists(path));
}

TEST_CASE("what -e sets is the application's, and not the next master's settings") {
    const TempDir dir;
    const string pidfile = dir.path + "/pid";
    Server server("import os\n" + kTools + R"py(
def sees(environ, start_response):
    return reply(start_response, os.environ["WEB_CONCURRENCY"])
)py",
                  {"-e", "WEB_CONCURRENCY=4", "-p", pidfile});
    CHECK(server.wait_ready_workers(2));
    CHECK(get(server, "/sees").body == "4");
    server.signal(SIGUSR2);
    REQUIRE(wait_for([&] { return exists(pidfile + ".2"); }));
    const pid_t heir = read_pidfile(pidfile + ".2");
    CHECK(wait_for([&] { return server.ready_workers(heir) >= 2; }));
    CHECK(server.children(heir).size() == 2);
    server.signal(SIGTERM);
    CHECK(server.wait_end());
    CHECK(get(server, "/sees").body == "4");
    CHECK(ends_by_term(heir));
}

TEST_CASE("a runner that starts where its directory has been replaced starts in the new one") {
    const TempDir dir;
    const string site = dir.path + "/site";
    const auto deploy = [&](const string& version) {
        output_of("rm -rf " + site + "; mkdir " + site);
        write_file(site + "/app.py", kTools + "\ndef version(environ, start_response):\n" +
                                         "    return reply(start_response, '" + version + "')\n");
    };
    deploy("old");
    const Server server("", {"-w", "1", "--chdir", site});
    CHECK(get(server, "/version").body == "old");
    deploy("new");
    CHECK(get(server, "/leave").status == 502);
    CHECK(get(server, "/version", 3s).body == "new");
}

TEST_CASE("a relative --worker-tmp-dir is looked for below --chdir at each reload") {
    const TempDir dir;
    for (const char* name : {"/v1", "/v1/tmp", "/v2", "/v2/tmp"}) {
        REQUIRE(::mkdir((dir.path + name).c_str(), 0755) == 0);
    }
    for (const char* name : {"/v1", "/v2"}) { write_file(dir.path + name + "/app.py", kHello); }
    const string current = dir.path + "/current";
    REQUIRE(::symlink("v1", current.c_str()) == 0);
    Server server(kHello, {"-w", "1", "--chdir", current, "--worker-tmp-dir", "tmp"});
    ::unlink(current.c_str());
    REQUIRE(::symlink("v2", current.c_str()) == 0);
    output_of("rm -r " + dir.path + "/v1");
    const vector<pid_t> before = server.workers();
    server.signal(SIGHUP);
    CHECK(wait_for([&] { return all_new(server, before, 1); }));
    CHECK_FALSE(contains(server.log(), "No new worker"));
    CHECK(get(server).body == "hello\n");
}

TEST_CASE("who was stopped as a whole during a graceful stop has its time nevertheless") {
    Server server(kTools + R"py(
def work(environ, start_response):
    mark("begun")
    for _ in range(20): time.sleep(0.05)
    return reply(start_response, "done")
)py",
                  {"-w", "1", "--graceful-timeout", "3"});
    Client client(server);
    client.send(get_bytes("/work"));
    REQUIRE(wait_file(server, "begun"));
    server.signal(SIGTERM);
    REQUIRE(server.log_has("Handling signal: term"));
    const pid_t worker = server.worker(), runner = server.runner();
    for (const pid_t pid : {runner, worker, server.pid}) { freeze(pid); }
    ::poll(nullptr, 0, 3500);
    for (const pid_t pid : {runner, worker, server.pid}) { ::kill(pid, SIGCONT); }
    CHECK(Reply(client.read_all()).body == "done");
    CHECK(server.wait_end());
    CHECK(server.exit_code() == 0);
}

TEST_CASE("who was stopped as a whole during a graceful stop is answered at its end") {
    Server server(kTools, {"-w", "1", "--graceful-timeout", "3"});
    Client client(server);
    client.send(get_bytes("/gate"));
    REQUIRE(wait_file(server, "at_gate"));
    server.signal(SIGTERM);
    REQUIRE(server.log_has("Handling signal: term"));
    ::poll(nullptr, 0, 1000);
    const pid_t worker = server.worker(), runner = server.runner();
    for (const pid_t pid : {runner, worker, server.pid}) { freeze(pid); }
    ::poll(nullptr, 0, 3500);
    for (const pid_t pid : {runner, worker, server.pid}) { ::kill(pid, SIGCONT); }
    CHECK(Reply(client.read_all()).status == 503);
    CHECK(server.wait_end());
    CHECK_FALSE(contains(server.log(), "signal 9"));
}

TEST_CASE("a request does not run out of time while all processes are stopped") {
    Server server(kTools, {"-w", "1", "-t", "2"});
    const pid_t worker = server.worker(), runner = server.runner();
    Client client(server);
    client.send(get_bytes("/gate"));
    REQUIRE(wait_file(server, "at_gate"));
    Client waiting(server);
    waiting.send(get_bytes("/hello"));
    ::poll(nullptr, 0, 100);
    for (const pid_t pid : {runner, worker, server.pid}) { freeze(pid); }
    ::poll(nullptr, 0, 3000);
    for (const pid_t pid : {server.pid, worker, runner}) { ::kill(pid, SIGCONT); }
    ::poll(nullptr, 0, 300);
    open_gate(server);
    CHECK(Reply(client.read_all()).body == "through");
    CHECK(Reply(waiting.read_all()).body == "hello");
    CHECK_FALSE(contains(server.log(), "WORKER TIMEOUT"));
}

TEST_CASE("who has sent the rest of a head in time is not told that it took too long") {
    Server server(kTools, {"-w", "1", "--header-timeout", "1"});
    const pid_t worker = server.worker();
    for (int round = 0; round < 3; ++round) {
        Client client(server);
        client.send("GET /hello HTTP/1.1\r\n");
        const Time start = Clock::now();  // others are busy, so that it is looked at less often
        load(server, 4, "/hello", [&] { return Clock::now() < start + 100ms; });
        vector<Client> busy = hold(server, 4, get_bytes("/hello"));
        freeze(worker);
        client.send("\r\n");
        ::poll(nullptr, 0, 1100);
        ::kill(worker, SIGCONT);
        CHECK(Reply(client.read_all()).status == 200);
    }
}

TEST_CASE("TERM serves what waits in the backlog, also of a worker that is full") {
    Server server(kTools + R"py(
def slow(environ, start_response):
    time.sleep(0.01)
    return reply(start_response, "slow")
)py",
                  {"-w", "1", "--worker-connections", "3"});
    Client first(server);
    first.send(get_bytes("/gate"));
    REQUIRE(wait_file(server, "at_gate"));
    vector<Client> clients = hold(server, 300, get_bytes("/slow"));
    const Client silent(server);
    server.signal(SIGTERM);
    CHECK(server.log_has("Handling signal: term"));
    open_gate(server);
    CHECK(Reply(first.read_all()).body == "through");
    int served = 0;
    for (Client& client : clients) { served += Reply(client.read_all()).body == "slow"; }
    CHECK(served == 300);
    CHECK(server.wait_end());
    CHECK(server.exit_code() == 0);
}

TEST_CASE(
    "a worker that stops without a descriptor for the backlog rests, and serves it in the end") {
    Server server(kTools, {"-w", "1"});
    const pid_t worker = server.worker();
    std::optional<Client> endless(server);
    endless->send(get_bytes("/endless"));
    REQUIRE(endless->readable(5s));
    struct rlimit ample = {}, few = {};
    REQUIRE(::prlimit(worker, RLIMIT_NOFILE, nullptr, &ample) == 0);
    few = {3, ample.rlim_max};
    REQUIRE(::prlimit(worker, RLIMIT_NOFILE, &few, nullptr) == 0);
    vector<Client> clients = hold(server, 5, get_bytes("/hello"));
    server.signal(SIGTERM);
    CHECK(server.log_has("Handling signal: term"));
    ::poll(nullptr, 0, 1000);
    CHECK(count(server.log(), "cannot accept") < 30);
    CHECK(count(server.log(), "cannot accept") > 0);
    endless.reset();
    ::poll(nullptr, 0, 300);
    REQUIRE(::prlimit(worker, RLIMIT_NOFILE, &ample, nullptr) == 0);
    for (Client& client : clients) { CHECK(Reply(client.read_all()).body == "hello"); }
    CHECK(server.wait_end());
}

TEST_CASE("with --reload a full disk costs the list of files and nothing else") {
    const string app = kTools + R"py(
def imports(environ, start_response):
    import wsgiref.validate
    return reply(start_response, "imported")
)py";
    for (const char* files : {"0", "8"}) {
        const Limit small(RLIMIT_FSIZE, 1000);
        Server server(app, {"-w", "1", "--threads", files == string("8") ? "2" : "1", "--reload",
                            "--error-logfile", "/dev/stderr", "--access-logfile", "/dev/null"});
        for (int i = 0; i < 4; ++i) { CHECK(get(server, "/imports").body == "imported"); }
        CHECK_FALSE(contains(server.log(), "exited with"));
    }
}

TEST_CASE("with --reload a change is seen where no file may grow") {
    const Limit none(RLIMIT_FSIZE, 0);
    const TempDir dir;
    const string path = dir.path + "/s", extra = dir.path + "/extra";
    write_file(extra, "one");
    const Server server("text = open('" + extra + "', 'rb').read()\n" +
                            "def app(e, s): return s('200 OK', []) and [text]\n",
                        {"-w", "1", "--reload", "--reload-extra-file", extra, "-b", "unix:" + path},
                        {}, false);
    REQUIRE(server.wait_ready_workers(1));
    const auto serves = [&](const string& text) {
        return wait_for([&] { return request_unix(path, get_bytes("/")).body == text; }, 8s);
    };
    CHECK(serves("one"));
    write_file(extra, "two");
    CHECK(serves("two"));
}

TEST_CASE("--check-config ends with its worker, by a signal, and where descriptor 3 is no socket") {
    const auto check = [](const string& app, const string& command) {
        const TempDir dir;
        write_file(dir.path + "/app.py", "import os, signal\n" + app);
        return output_of("cd " + dir.path + "; SERVER=" + quoted_server() + "; " + command +
                         " --check-config --python /usr/bin/python3 app:app >out 2>&1 3</dev/null; "
                         "printf '%s ' $?; cat out");
    };
    const string plain = "timeout 10 \"$SERVER\"";
    CHECK(check("app = print", plain) == "0 ");
    CHECK(check("os.kill(os.getppid(), 9)\napp = print", plain).substr(0, 2) == "3 ");
    const string ended = check("os.kill(int(os.environ['MASTER']), 15)\nsignal.pause()",
                               "sh -c 'MASTER=$$ exec \"$@\"' - \"$SERVER\"");
    CHECK(ended.substr(0, 4) == "143 ");
    const string told =
        check("app = print", "sh -c 'LISTEN_FDS=1 LISTEN_PID=$$ exec \"$@\"' - \"$SERVER\"");
    CHECK(told == "1 Error: descriptor 3 is no listening socket, or is named twice");
}

TEST_CASE("a umask that takes away even the user's rights harms no worker") {
    if (!may_become_and_see_others().second) {
        MESSAGE("not run: only root becomes another user");
        return;
    }
    Server::before_exec = [] { ::umask(0377); };
    const Server server(kHello, {"-w", "1", "-u", "nobody", "--access-logfile", "/dev/null"}, {},
                        false);
    Server::before_exec = nullptr;
    ::chmod(server.dir.path.c_str(), 0755);
    REQUIRE(server.wait_ready_workers(1));
    CHECK(get(server).body == "hello\n");
}

TEST_CASE("a small stack is enough, and a parent that ignores SIGCHLD hides no status") {
    const string check = " timeout 20 " + quoted_server() + " --check-config --python ";
    const TempDir dir;
    write_file(dir.path + "/app.py", kHello);
    CHECK(output_of("cd " + dir.path + "; ulimit -s 256;" + check +
                    "/usr/bin/python3 app:app 2>&1; echo $?") == "0");
    CHECK(contains(output_of("trap '' CHLD; (exec" + check + "/nothing 2>&1); echo status $?"),
                   "status 3"));
}

TEST_CASE("a reload that mends the application does not wait for the next attempt of the broken") {
    Server server(kHello, {"-w", "2"});
    write_file(server.dir.path + "/app.py", "broken\n");
    ::kill(server.worker(), SIGKILL);
    REQUIRE(server.log_has("Workers fail: the next starts in 4 s", 15s));
    write_file(server.dir.path + "/app.py", kHello);
    const vector<pid_t> before = server.workers();
    server.signal(SIGHUP);
    CHECK(wait_for([&] { return all_new(server, before, 2); }, 2s));
    CHECK(get(server).body == "hello\n");
    const vector<pid_t> mended = server.workers();  // who pay for nothing that others did
    ::kill(mended.at(0), SIGKILL);
    CHECK(wait_for([&] { return server.ready_workers() == 2 && server.workers() != mended; }, 2s));
    CHECK_FALSE(contains(server.log(), "starts in 8 s"));
}

TEST_CASE("a server that cannot start leaves no pid file and no socket") {
    const TempDir dir;
    const string paths[] = {dir.path + "/pid", dir.path + "/s"};
    for (int files = 8; files < 13; ++files) {
        CAPTURE(files);
        write_file(dir.path + "/start", "ulimit -n " + to_string(files) + "; exec " +
                                            quoted_server() + " -w 1 --python /nothing -p " +
                                            paths[0] + " -b unix:" + paths[1]);
        const string said = output_of("timeout 10 sh " + dir.path + "/start 2>&1");
        CHECK(said != "");
        for (const string& path : paths) { CHECK_FALSE(exists(path)); }
    }
}

TEST_CASE("who cannot give the heartbeat file to --user says so at the start") {
    if (!may_become_and_see_others().first) {
        MESSAGE("not run: only root gives files away");
        return;
    }
    const TempDir dir;
    const string said =
        output_of("setpriv --bounding-set=-chown,-fowner timeout 10 " + quoted_server() +
                  " -u nobody -b unix:" + dir.path + "/s --python /nothing 2>&1; echo status $?");
    CHECK_MESSAGE(contains(said, "cannot chown a file: Operation not permitted"), said);
    CHECK_MESSAGE(contains(said, "status 3"), said);
}

TEST_CASE("reloads, upgrades, more and fewer workers, and a killed one, under load") {
    // DRILL_SECONDS=20 stretches what happens in five seconds here.
    const char* given = std::getenv("DRILL_SECONDS");
    const double length = given != nullptr ? std::atof(given) : 5;
    Server server(kTools + kOnce);
    REQUIRE(server.wait_ready_workers(2));
    pid_t master = server.pid;
    vector<pid_t> killed;
    const vector<std::pair<double, std::function<void()> > > steps = {
        {0.05, [&] { ::kill(master, SIGTTIN); }},
        {0.15, [&] { ::kill(master, SIGHUP); }},
        {0.35, [&] { ::kill(master, SIGUSR2); }},
        {0.55,
         [&] {
             const pid_t heir = heir_of(server);
             REQUIRE(server.wait_ready_workers(2));
             REQUIRE(wait_for([&] { return server.ready_workers(heir) == 2; }));
             ::kill(master, SIGTERM);
             master = heir;
         }},
        {0.7, [&] { ::kill(master, SIGTTIN); }},
        {0.8,
         [&] {
             killed = server.children(master);
             killed.resize(1);
             ::kill(killed[0], SIGKILL);
         }},
        {0.9, [&] { ::kill(master, SIGTTOU); }},
    };
    const Time start = Clock::now();
    size_t step = 0;
    map<string, int> answers = load(server, 4, "/once?", [&] {
        const double part = seconds_since(start) / length;
        if (step < steps.size() && part > steps[step].first) { steps[step++].second(); }
        return part < 1;
    });
    CAPTURE(show_answers(answers));
    CHECK(step == steps.size());
    CHECK(answers["200 ok"] > 100);
    const int lost = answers["cut"];  // what the killed worker held
    CHECK(lost <= 4);
    answers.erase("cut");
    CHECK(answers.size() == 1);
    CHECK(server.wait_end());
    CHECK(master != server.pid);
    CHECK(wait_for([&] { return server.children(master).size() == 2; }));
    ::kill(master, SIGTERM);
    CHECK(wait_for([&] { return !alive(master); }));
}

TEST_CASE("old workers leave at a reload, and the new ones finish what clients have half sent") {
    const string app = kTools + R"py(
import hashlib
def echo(environ, start_response):
    body = environ["wsgi.input"].read()
    return reply(start_response, "%s %s %s %s %d %s" % (
        version, environ["REMOTE_ADDR"], environ["REQUEST_METHOD"], environ.get("HTTP_X", ""),
        len(body), hashlib.md5(body).hexdigest()))
)py";
    const auto version = [&](int n) {
        const string text = app + "version = 'v" + to_string(n) + "'  # ";
        return text + string(static_cast<size_t>(n), '.');  // or a .pyc would do for two of them
    };
    Server server(version(1), {"--proxy-protocol", "--header-timeout", "6"});
    REQUIRE(server.wait_ready_workers(2));
    const string big(300000, 'b');
    const auto md5 = [](const string& data) {
        const TempDir dir;
        write_file(dir.path + "/data", data);
        return output_of("md5sum <" + dir.path + "/data | cut -d' ' -f1");
    };
    const string chunked = "POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n";
    const string length = "POST /echo HTTP/1.1\r\nContent-Length: ";
    const struct {
        string first, rest, expected;
    } cases[] = {
        {"", get_bytes("/echo"), "127.0.0.1 GET  0 " + md5("")},
        {"\r\nGE", "T /echo HTTP/1.1\r\nX: y\r\n\r\n", "127.0.0.1 GET y 0 " + md5("")},
        {"GET /echo HTTP/1.1\r\nX: y\r\nX: z", "z\r\n\r\n", "127.0.0.1 GET y,zz 0 " + md5("")},
        {"PROXY TCP4 10.1.2.3 127.0.0.1 1 2\r\nGET /ec", "ho HTTP/1.1\r\n\r\n",
         "10.1.2.3 GET  0 " + md5("")},
        {"PROXY TCP4 10.1.2.3 127.", "0.0.1 1 2\r\nGET /echo HTTP/1.1\r\n\r\n",
         "10.1.2.3 GET  0 " + md5("")},
        {length + "3\r\n\r\n", "abc", "127.0.0.1 POST  3 " + md5("abc")},
        {length + "3\r\n\r\na", "bc", "127.0.0.1 POST  3 " + md5("abc")},
        {length + "300000\r\n\r\n" + big.substr(1), "b", "127.0.0.1 POST  300000 " + md5(big)},
        {chunked + "3\r\nab", "c\r\n0\r\n\r\n", "127.0.0.1 POST  3 " + md5("abc")},
        {chunked + "3\r\nabc\r", "\n1\r\nd\r\n0\r\n\r\n", "127.0.0.1 POST  4 " + md5("abcd")},
        {chunked + "3\r\nabc\r\n1;x", "=y\r\nd\r\n0\r\n\r\n", "127.0.0.1 POST  4 " + md5("abcd")},
        {chunked + "3\r\nabc\r\n0\r\nT", ": x\r\n\r\n", "127.0.0.1 POST  3 " + md5("abc")},
    };
    vector<Client> clients;  // two for each, of which the second sends its first line by itself
    for (const auto& row : cases) {
        clients.emplace_back(server);
        clients.back().send(row.first);
        clients.emplace_back(server);
        clients.back().send(row.first.substr(0, row.first.find('\n') + 1));
    }
    CHECK(wait_for([&] { return unread(server.port()) == 0; }));
    for (size_t i = 1; i < clients.size(); i += 2) {
        const string& first = cases[i / 2].first;
        clients[i].send(first.substr(first.find('\n') + 1));
    }
    Client late(server);
    late.send("GET /late HTTP/1.1\r\nHost");
    const Time begun = Clock::now();
    CHECK(wait_for([&] { return unread(server.port()) == 0; }));
    for (int generation = 2; generation <= 3; ++generation) {  // the second time one goes on twice
        const vector<pid_t> before = server.workers();
        write_file(server.dir.path + "/app.py", version(generation));
        server.signal(SIGHUP);
        CHECK(wait_for([&] { return all_new(server, before, 2); }, 3s));
    }
    CHECK(seconds_since(begun) < 5.5);  // nobody waited for the header timeout
    CHECK(wait_for([&] { return seconds_since(begun) > 1.3; }));  // nor has a silent one less time
    for (size_t i = 0; i < clients.size(); ++i) {
        const auto& row = cases[i / 2];
        CAPTURE(row.first.substr(0, 100));
        clients[i].send(row.rest);
        CHECK(Reply(clients[i].read_all()).body == "v3 " + row.expected);
    }
    CHECK(Reply(late.read_all()).status == 408);  // its clock went on
    CHECK(server.log_has("took too long: GET /late HTTP/1.1"));
    CHECK(seconds_since(begun) > 5.5);
    CHECK(seconds_since(begun) < 6.5);
}

TEST_CASE("a reload that another overtakes leaves no worker with what it had loaded") {
    const auto version = [](size_t n) {
        return kTools + "mark('loading')\ntime.sleep(0.5)\ndef show(environ, start_response):\n" +
               "    return reply(start_response, 'v" + to_string(n) + "')  # " + string(n, '.');
    };
    const Server server(version(1));
    REQUIRE(server.wait_ready_workers(2));
    for (const size_t n : {size_t{2}, size_t{3}}) {
        write_file(server.dir.path + "/app.py", version(n));
        server.signal(SIGHUP);
        REQUIRE(wait_file(server, "loading", n + 1));
    }
    CHECK(wait_for([&] { return count(server.log(), "Worker exiting") == 3; }));
    CHECK(wait_for([&] { return server.workers().size() == 2; }));  // they say so, then exit
    CHECK_FALSE(wait_for([&] { return get(server, "/show").body != "v3"; }, 300ms));
}

TEST_CASE("the old workers stay at a reload until as many new ones are ready") {
    const Server server(kTools + R"py(
mark("loads")
if len(open("loads").read()) == 4:
    wait("go")  # the second of the new ones
)py");
    REQUIRE(server.wait_ready_workers(2));
    const vector<pid_t> before = server.workers();
    const auto left = [&] {
        const vector<pid_t> now = server.workers();
        return count_if(before.begin(), before.end(), [&](pid_t p) { return has_pid(now, p); });
    };
    server.signal(SIGHUP);
    REQUIRE(wait_file(server, "loads", 4));
    CHECK_FALSE(wait_for([&] { return left() < 2; }, 300ms));
    open_gate(server);
    CHECK(wait_for([&] { return left() == 0 && server.workers().size() == 2; }));
}

TEST_CASE("a worker takes over unfinished requests though its runner is busy") {
    Server server(kTools, {"--header-timeout", "2"});
    REQUIRE(server.wait_ready_workers(2));
    vector<Client> halves = hold(server, 8, "GET /hel");  // some to either worker
    Client busy(server);
    busy.send(get_bytes("/gate"));
    CHECK(wait_for([&] { return exists(server.dir.path + "/at_gate"); }));
    server.signal(SIGTTOU);  // one of them leaves: the busy one, or the other
    write_file(server.dir.path + "/go", "");
    CHECK(Reply(busy.read_all()).body == "through");
    for (Client& half : halves) {
        half.send("lo HTTP/1.1\r\n\r\n");
        CHECK(Reply(half.read_all()).body == "hello");
    }
    CHECK(wait_for([&] { return server.workers().size() == 1; }));
}

TEST_CASE("unfinished requests do not go to a worker that may never serve") {
    Server server(kTools + R"py(
if os.path.exists("broken"):
    mark("importing")
    wait("fail")
    raise RuntimeError
)py",
                  {"-w", "2"});
    REQUIRE(server.wait_ready_workers(2));
    vector<Client> halves = hold(server, 8, "GET /hel");  // some to either worker
    CHECK(wait_for([&] { return unread(server.port()) == 0; }));
    const vector<pid_t> serving = server.workers();
    write_file(server.dir.path + "/broken", "");
    server.signal(SIGHUP);
    REQUIRE(wait_file(server, "importing"));
    ::kill(serving.at(1), SIGSTOP);
    server.signal(SIGTTOU);  // the oldest leaves, to the other, which is frozen
    CHECK(wait_for([&] { return !alive(serving.at(0)); }));
    write_file(server.dir.path + "/fail", "");
    CHECK(server.log_has("Reload failed"));
    ::kill(serving.at(1), SIGCONT);
    for (Client& half : halves) {
        half.send("lo HTTP/1.1\r\n\r\n");
        CHECK(Reply(half.read_all()).body == "hello");
    }
}

TEST_CASE("with --reload a change of a file that the application has loaded is a reload") {
    const auto version = [](const string& name, int n) {
        return name + " = '" + to_string(n) + "'\n" + string(static_cast<size_t>(n), '#') + "\n";
    };
    const string app = kTools + R"py(
sys.dont_write_bytecode = True
import early, types
class Lazy(types.ModuleType):
    def __getattr__(self, name):
        raise ImportError(name)
sys.modules["lazy"] = Lazy("lazy")
def versions(environ, start_response):
    import late
    return reply(start_response, "%s %s %s" % (early.early, late.late, open("extra").read()))
)py";
    const TempDir dir;
    write_file(dir.path + "/early.py", version("early", 1));
    write_file(dir.path + "/late.py", version("late", 1));
    write_file(dir.path + "/extra", "1");
    Server server(app,
                  {"--reload", "--reload-extra-file", dir.path + "/extra", "--pythonpath", dir.path,
                   "-t", "1"},
                  {}, false);
    REQUIRE(server.wait_ready_workers(2));
    write_file(server.dir.path + "/extra", "-");
    const auto hups = [&] { return count(server.log(), "Hang up: Master"); };
    const auto becomes = [&](const string& body) {
        return wait_for([&] { return get(server, "/versions").body == body; }, 8s);
    };
    CHECK(becomes("1 1 -"));
    CHECK(hups() == 0);
    const auto settle = [&] {  // until the new workers have looked at all files once
        vector<pid_t> before = server.workers();
        ::poll(nullptr, 0, 700);
        return server.workers() == before && before.size() == 2;
    };
    CHECK(wait_for(settle, 10s));
    write_file(dir.path + "/early.py", version("early", 2));
    CHECK(becomes("2 1 -"));
    CHECK(wait_for(settle, 10s));
    CHECK(hups() == 1);  // one, though both workers saw it
    CHECK(contains(server.log(), "Worker reloading: " + dir.path + "/early.py modified"));
    CHECK(get(server, "/versions").status == 200);
    for (int i = 0; i < 20; ++i) { get(server, "/versions"); }  // both runners have loaded it
    CHECK(wait_for(settle, 10s));
    write_file(dir.path + "/late.py", version("late", 2));
    CHECK(wait_for([&] { return hups() == 2; }));  // a runner new to it imports version 2 anyway
    CHECK(becomes("2 2 -"));
    CHECK(wait_for(settle, 10s));
    CHECK(hups() == 2);
    write_file(dir.path + "/extra", "22");
    CHECK(wait_for([&] { return hups() == 3; }));
    CHECK(wait_for(settle, 10s));
    write_file(dir.path + "/early.py", "no python\n");  // the old workers go on, and watch on
    CHECK(server.log_has("SyntaxError"));
    CHECK(get(server, "/versions").body == "2 2 -");
    write_file(dir.path + "/early.py", version("early", 3));
    CHECK(becomes("3 2 -"));
    CHECK(wait_for(settle, 10s));
    write_file(dir.path + "/fresh.py", "fresh = 1 / 0\n");  // which the old workers know nothing of
    write_file(dir.path + "/early.py", "from fresh import fresh\n" + version("early", 4));
    CHECK(server.log_has("ZeroDivisionError"));
    CHECK(get(server, "/versions").body == "3 2 -");
    write_file(dir.path + "/fresh.py", "fresh = (\n");
    CHECK(server.log_has("/fresh.py modified"));
    CHECK(wait_for([&] { return count(server.log(), "SyntaxError") == 2; }));
    write_file(dir.path + "/fresh.py", "fresh = 0\n");
    CHECK(becomes("4 2 -"));
}

TEST_CASE("with --reload changes that the new workers have seen are no second reload; others are") {
    const string app = kTools + R"py(
sys.dont_write_bytecode = True
import module
while os.path.exists("wait"):
    mark("loading")
    time.sleep(0.01)
def version(environ, start_response): return reply(start_response, module.version)
)py";
    for (const bool late : {false, true}) {  // a worker sees it while the canary boots, or later
        CAPTURE(late);
        const TempDir dir;
        const string wait = "/wait", extra = dir.path + "/extra";
        write_file(dir.path + "/module.py", "version = '1'\n");
        write_file(extra, "");
        Server server(app, {"--reload", "--reload-extra-file", extra, "--pythonpath", dir.path});
        REQUIRE(server.wait_ready_workers(2));
        CHECK(get(server, "/version").body == "1");
        const auto hups = [&] { return count(server.log(), "Hang up: Master"); };
        const auto wishes = [&] { return count(server.log(), "Worker reloading"); };
        const vector<pid_t> old = server.workers();
        freeze(old.at(1));
        write_file(server.dir.path + wait, "");
        write_file(dir.path + "/module.py", "version = '22'\n");
        CHECK(wait_for([&] { return hups() == 1; }));
        CHECK(wait_for([&] { return server.workers().size() == 3; }));
        const auto resume = [&] {
            ::kill(old.at(1), SIGCONT);
            CHECK(wait_for([&] { return wishes() == 2; }));
        };
        if (!late) { resume(); }
        ::unlink((server.dir.path + wait).c_str());
        CHECK(wait_for([&] { return !alive(old.at(0)); }));
        if (late) { resume(); }
        CHECK(wait_for([&] { return server.workers().size() == 2; }));
        CHECK(get(server, "/version").body == "22");
        ::poll(nullptr, 0, 1500);
        CHECK(hups() == 1);
        if (late) { continue; }
        for (const pid_t each : server.workers()) { freeze(each); }
        ::unlink((server.dir.path + "/loading").c_str());
        write_file(server.dir.path + wait, "");
        server.signal(SIGHUP);
        CHECK(wait_file(server, "loading"));
        write_file(extra, "3");
        CHECK(wait_for([&] { return wishes() == 3; }));  // of the canary
        ::unlink((server.dir.path + wait).c_str());
        CHECK(wait_for([&] { return hups() == 3; }));
        for (const pid_t each : server.workers()) { ::kill(each, SIGCONT); }
    }
}

TEST_CASE("with --reload a file that the application has loaded is listed once") {
    const Server server(kTools, {"-w", "1", "--reload"});
    const string list = "find -L /proc/" + to_string(server.worker()) +
                        "/fd -type f -links 0 -exec cat {} + | tr '\\0' '\\n'";
    CHECK(count(output_of(list), "/app.py") == 1);
    for (int i = 0; i < 10; ++i) { CHECK(get(server, "/hello").body == "hello"); }
    CHECK(count(output_of(list), "/app.py") == 1);
}

TEST_CASE("with --reload an application that does not load waits until one of its files changes") {
    Server server("app = no_such_name\n", {"--reload", "-t", "1"}, {}, false);
    CHECK(server.log_has("NameError"));
    CHECK(server.log_has("The application is loaded again when one of its files changes\n"));
    CHECK_FALSE(server.wait_end(1500ms));  // a second and more: it is no hung application
    write_file(server.dir.path + "/app.py", kHello);
    CHECK(server.wait_ready_workers(2));
    CHECK(get(server).body == "hello\n");
    CHECK(wait_for([&] { return server.workers().size() == 2; }));
    CHECK(run_to_end({"--reload", "--check-config", "--python", "/usr/bin/python3", "app:app"}, {},
                     "no python")
              .code == 4);
}

TEST_CASE("what a client sent in time counts, though nobody was there to read it") {
    Server server(kTools, {"-w", "1", "--header-timeout", "1"});
    Client busy(server), half(server);
    busy.send(get_bytes("/gate"));
    half.send("GET /hel");
    CHECK(wait_for([&] { return exists(server.dir.path + "/at_gate"); }));
    CHECK(wait_for([&] { return unread(server.port()) == 0; }));
    const Time begun = Clock::now();
    ::kill(server.worker(), SIGTERM);  // who hands it over, but there is nobody else yet
    half.send("lo HTTP/1.1\r\n\r\n");
    CHECK(wait_for([&] { return seconds_since(begun) > 1.2; }));
    write_file(server.dir.path + "/go", "");
    CHECK(Reply(busy.read_all()).body == "through");
    CHECK(Reply(half.read_all()).body == "hello");
}

TEST_CASE("workers that fail in a row start later and later, and the others serve meanwhile") {
    const Server server(kTools, {"-w", "2"});
    REQUIRE(server.wait_ready_workers(2));
    write_file(server.dir.path + "/app.py", "broken = [");
    ::kill(server.worker(), SIGKILL);
    REQUIRE(server.log_has("Workers fail: the next starts in 1 s"));
    REQUIRE(server.log_has("Workers fail: the next starts in 2 s"));
    const auto more = [&] { return count(server.log(), "Booting worker with pid: ") > 4; };
    CHECK_FALSE(wait_for(more, 1s));
    CHECK(get(server, "/hello").body == "hello");
    write_file(server.dir.path + "/app.py", kTools);
    CHECK(server.wait_ready_workers(2));
}

TEST_CASE("the number of workers that TTIN set outlives a reload") {
    const Server server(kHello, {"-w", "1"});
    server.signal(SIGTTIN);
    REQUIRE(server.wait_ready_workers(2));
    const vector<pid_t> before = server.workers();
    server.signal(SIGHUP);
    CHECK(wait_for([&] { return all_new(server, before, 2); }));
    CHECK(server.wait_ready_workers(2));
}

TEST_CASE("a runner that dies while its successor loads is succeeded by that, not by a third") {
    Server server(kTools + R"py(
mark("loads")
if os.path.exists("slow"):
    wait("go")
)py",
                  {"-w", "1", "--max-requests", "2"});
    write_file(server.dir.path + "/slow", "");
    const pid_t first = server.runner();
    for (int i = 0; i < 2; ++i) { CHECK(get(server, "/hello").body == "hello"); }
    REQUIRE(wait_file(server, "loads", 2));
    ::kill(first, SIGKILL);
    CHECK(server.log_has("was ended by signal 9 (Killed)"));
    Client waiting(server);
    waiting.send(get_bytes("/hello"));
    CHECK_FALSE(waiting.readable(300ms));
    open_gate(server);
    CHECK(Reply(waiting.read_all()).body == "hello");
    CHECK(read_file(server.dir.path + "/loads").size() == 2);
}

TEST_CASE("when the directory for small files vanishes all goes on, and heals once it is back") {
    const TempDir dir;
    const string small = dir.path + "/small";
    REQUIRE(::mkdir(small.c_str(), 0755) == 0);
    Server server(kTools, {"--max-requests", "3", "--worker-tmp-dir", small}, {"TMPDIR=" + small});
    REQUIRE(server.wait_ready_workers(2));
    REQUIRE(::rmdir(small.c_str()) == 0);
    const vector<pid_t> workers = server.workers();
    const auto asked_until = [&](const std::function<bool()>& condition) {
        const Time end = Clock::now() + 5s;
        const auto answers =
            load(server, 4, "/hello", [&] { return !condition() && Clock::now() < end; });
        CHECK_MESSAGE(answers.size() == 1, show_answers(answers));
        CHECK(answers.count("200 hello") == 1);
        return condition();
    };
    const auto says = [&](pid_t pid, const string& text) {
        return contains(server.log(), "[" + to_string(pid) + "] " + text);
    };
    CHECK(asked_until([&] {  // a successor needs no file
        return says(workers[0], "[INFO] Autorestarting") &&
               says(workers[1], "[INFO] Autorestarting");
    }));
    ::kill(workers[0], SIGKILL);
    CHECK(server.log_has("No new worker: cannot make a temporary file in " + small));
    CHECK(get(server, "/hello").body == "hello");
    REQUIRE(::mkdir(small.c_str(), 0755) == 0);
    CHECK(server.wait_ready_workers(2));
}

TEST_CASE("too few descriptors for a worker end the server, which says so") {
    for (rlim_t most = 10; most <= 18; ++most) {
        const Limit descriptors(RLIMIT_NOFILE, most);
        Server server(kHello, {"-w", "1"}, {}, false);
        CHECK(server.wait_end(15s));
        CHECK_MESSAGE(server.exit_code() == 3, server.log());
        CHECK(contains(server.log(), most == 10 ? "No new worker: " : "Worker cannot boot: "));
        CHECK_MESSAGE(contains(server.log(), ": Too many open files\n"), server.log());
        CHECK(contains(server.log(), "Worker failed to boot."));
    }
}

TEST_CASE("a relative path of the error log means one file, wherever the application goes") {
    Server server(string("import os\nos.mkdir('elsewhere')\nos.chdir('elsewhere')\n") + kTalkative,
                  {"-w", "1", "--error-logfile", "err"});
    const int port = server.port();
    CHECK(request(port, get_bytes("/one")).body == "ok");
    CHECK(server.log_has("printed /one"));
    const string path = server.dir.path + "/err";
    REQUIRE(::rename(path.c_str(), (path + ".1").c_str()) == 0);
    server.signal(SIGUSR1);
    CHECK(wait_for([&] {
        CHECK(request(port, get_bytes("/two")).body == "ok");
        return contains(server.log(), "printed /two");
    }));
    CHECK_FALSE(exists(server.dir.path + "/elsewhere/err"));
}

TEST_CASE("a client may leave when the runner has begun its request and the worker not seen it") {
    Server server(kTools + R"py(
import select

def big(environ, start_response):
    slot = start_response.__self__.slot
    following = slot.requests[(slot.index + 1) % len(slot.requests)]
    select.select([following], [], [], 0.1)  # until the next request lies there
    os.kill(os.getppid(), signal.SIGSTOP)
    return reply(start_response, b"b" * 200000)

def endless(environ, start_response):
    mark("begun")
    start_response("200 OK", [])
    try:
        wait("known")
        while True:
            time.sleep(0.005)
            yield b"e"
    finally:
        mark("left")
)py",
                  {"-w", "1"});
    const pid_t worker = server.worker(), runner = server.runner();
    // The worker gets both requests at once, and hands over the second ahead of time if the runner
    // has been quick. It is stopped before it takes that back, if all goes well; what the runner
    // says of the first stays in the pipe, and of the second it says nothing before its client
    // left.
    bool begun = false;
    for (const Time end = Clock::now() + 15s; !begun && Clock::now() < end;) {
        for (int i = 0; i < 60; ++i) {  // quick on the average, also after the last attempt
            CHECK(get(server, "/hello").body == "hello");
        }
        for (const char* name : {"/begun", "/left", "/known"}) {
            ::unlink((server.dir.path + name).c_str());
        }
        freeze(worker);
        Client first(server), second(server);
        first.send(get_bytes("/big"));
        second.send(get_bytes("/endless"));
        ::kill(worker, SIGCONT);
        CHECK(wait_for([&] { return parent_and_state(worker).second == 'T'; }));
        begun = wait_for([&] { return exists(server.dir.path + "/begun"); }, 300ms);
        second.reset();
        ::kill(worker, SIGCONT);
        const Reply reply(first.read_all());
        CHECK(reply.whole);
        CHECK(reply.body == string(200000, 'b'));
        if (begun) { CHECK(server.access_has("GET /endless HTTP/1.1\" 499")); }
        write_file(server.dir.path + "/known", "");
    }
    REQUIRE(begun);
    CHECK(wait_file(server, "left"));
    CHECK(get(server, "/hello").body == "hello");
    CHECK(server.runners() == vector<pid_t>{runner});
    CHECK_FALSE(contains(server.log(), "[ERROR]"));
}

TEST_CASE("systemd hands over sockets, and hears what goes on") {
    const TempDir dir;
    sockaddr_un name{};
    name.sun_family = AF_UNIX;
    (dir.path + "/notify").copy(name.sun_path, sizeof name.sun_path - 1);
    const Fd hears(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
    REQUIRE(::bind(hears.get(), reinterpret_cast<sockaddr*>(&name), sizeof name) == 0);
    string heard;
    const auto listen = [&] {
        char buffer[1000];
        for (ssize_t n; (n = ::recv(hears.get(), buffer, sizeof buffer, MSG_DONTWAIT)) > 0;) {
            heard += string(buffer, static_cast<size_t>(n)) + "\n";
        }
    };
    const auto hear = [&](const string& text) {
        return wait_for([&] { return listen(), contains(heard, text); });
    };
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    vector<Fd> sockets;
    vector<int> ports;
    for (int i = 0; i < 2; ++i) {
        sockets.emplace_back(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
        address.sin_port = 0;
        REQUIRE(::bind(sockets.back().get(), reinterpret_cast<sockaddr*>(&address),
                       sizeof address) == 0);
        REQUIRE(::listen(sockets.back().get(), 5) == 0);
        socklen_t size = sizeof address;
        ::getsockname(sockets.back().get(), reinterpret_cast<sockaddr*>(&address), &size);
        ports.push_back(ntohs(address.sin_port));
    }
    Server::before_exec = [&] {
        for (int i = 0; i < 2; ++i) { ::dup2(sockets[static_cast<size_t>(i)].get(), 100 + i); }
        for (int i = 0; i < 2; ++i) { ::dup2(100 + i, 3 + i), ::close(100 + i); }
        ::setenv("LISTEN_PID", to_string(::getpid()).c_str(), 1);
        ::setenv("LISTEN_FDS", "2", 1);
        ::setenv("NOTIFY_SOCKET", (dir.path + "/notify").c_str(), 1);
    };
    Server server(kTools + R"py(
def env(environ, start_response):
    return reply(start_response, sorted(k for k in os.environ if k[:6] in ("LISTEN", "NOTIFY")))

wait("go")
)py",
                  {}, {}, false);
    Server::before_exec = nullptr;
    REQUIRE(wait_for([&] { return server.workers().size() == 2; }));
    const vector<pid_t> first = server.workers();
    server.signal(SIGHUP);
    REQUIRE(wait_for([&] { return server.workers().size() == 3; }));
    for (const pid_t pid : server.workers()) {
        if (!has_pid(first, pid)) { ::kill(pid, SIGKILL); }
    }
    CHECK(server.log_has("Reload failed"));
    listen();
    CHECK_FALSE(contains(heard, "READY=1"));  // for nothing serves yet
    write_file(server.dir.path + "/go", "");
    CHECK(hear("READY=1\nSTATUS=2 workers"));
    for (const int port : ports) {
        CHECK(contains(server.log(), "http://127.0.0.1:" + to_string(port)));
        CHECK(request(port, get_bytes("/env")).body == "[]");
    }
    heard.clear();
    server.signal(SIGHUP);
    CHECK(hear("RELOADING=1\nMONOTONIC_USEC="));
    CHECK(hear("READY=1"));
    heard.clear();
    write_file(server.dir.path + "/app.py", "no python\n");
    server.signal(SIGHUP);
    CHECK(hear("RELOADING=1"));
    CHECK(hear("READY=1"));  // the old workers go on
    heard.clear();
    write_file(server.dir.path + "/app.py", kHello);
    server.signal(SIGUSR2);
    CHECK(hear("READY=1"));  // from the new master, which has learnt where to say it
    const pid_t heir = heir_of(server);
    heard.clear();
    server.signal(SIGTERM);
    CHECK(hear("MAINPID=" + to_string(heir)));
    CHECK(server.wait_end());
    CHECK(server.log_has("promoted"));
    ::kill(heir, SIGTERM);
    CHECK(hear("STOPPING=1"));
    CHECK(count(heard, "STOPPING") == 1);
}

TEST_CASE("the file of a unix socket that another made stays, also after an upgrade") {
    for (const bool systemd : {true, false}) {
        CAPTURE(systemd);
        const TempDir dir;
        const string path = dir.path + "/s", own = dir.path + "/own";
        const Fd socket = bind_unix_socket(path, true);
        Server::before_exec = [&] {
            ::dup2(socket.get(), 100);
            ::dup2(100, 3);
            ::setenv("LISTEN_PID", systemd ? to_string(::getpid()).c_str() : "", 1);
            ::setenv("LISTEN_FDS", "1", 1);
        };
        Server server(kHello, {"-b", systemd ? "unix:" + path : "fd://3", "-b", "unix:" + own});
        Server::before_exec = nullptr;
        CHECK(exists(own) != systemd);
        server.signal(SIGUSR2);
        const pid_t heir = heir_of(server);
        REQUIRE(wait_for([&] { return server.ready_workers(heir) == 2; }));
        server.signal(SIGTERM);
        REQUIRE(server.wait_end());
        CHECK(request_unix(path, get_bytes("/")).body == "hello\n");
        CHECK(exists(own) != systemd);
        CHECK(ends_by_term(heir));
        CHECK(exists(path));
        CHECK_FALSE(exists(own));
    }
}

TEST_SUITE_END();

// --- README.md: the lesson ------------------------------------------------------------------
TEST_SUITE_BEGIN("lesson");

/// The n-th block of code in README.md in this language.
string readme_block(const string& language, size_t n = 0) {
    const string readme = read_file("README.md"), fence = "```" + language + "\n";
    size_t at = readme.find(fence);
    while (at != string::npos && n-- > 0) { at = readme.find(fence, at + 1); }
    REQUIRE(at != string::npos);
    at += fence.size();
    return readme.substr(at, readme.find("```", at) - at);
}

string replaced(string text, const string& from, const string& to) {
    REQUIRE(contains(text, from));
    for (size_t at = 0; (at = text.find(from, at)) != string::npos; at += to.size()) {
        text.replace(at, from.size(), to);
    }
    return text;
}

/// The part of README.md below a heading.
string readme_section(const string& heading) {
    const string readme = read_file("README.md");
    const size_t begin = readme.find("\n" + heading + "\n");
    REQUIRE(begin != string::npos);
    return readme.substr(begin, readme.find("\n## ", begin + heading.size() + 2) - begin);
}

/// A line without what differs from run to run: the numbers, and the width of blanks.
string shape(const string& line) {
    string out;
    for (const char c : line) {
        if (c == '\r') { continue; }
        const char each = is_digit(c) ? '#' : c;
        if ((each == '#' || each == ' ') && !out.empty() && out.back() == each) { continue; }
        out += each;
    }
    return string(trim(out));
}

/// Whether the lines of `expected` are found in those of `text`, in this order; else the line that
/// is not. What follows a … may be anything. A number of three digits at the most that stands alone
/// is a count or a status, and has to be the same; a longer one is of a process.
string missing_line(const string& text, const string& expected) {
    std::istringstream lines(text), wanted(expected);
    string line, want;
    while (std::getline(wanted, want)) {
        const bool open = contains(want, "…");
        const bool number =
            !want.empty() && want.size() <= 3 && std::all_of(want.begin(), want.end(), is_digit);
        const string form = number ? want : shape(want.substr(0, want.find("…")));
        bool found = false;
        while (!found && std::getline(lines, line)) {
            const string got = number ? string(trim(line)) : shape(line);
            const size_t at = got.find(form);
            found = number ? got == form : at != string::npos;
            found = found && (open || number || got.size() == at + form.size());
        }
        if (!found) { return want; }
    }
    return "";
}

TEST_CASE("a line of the lesson is found whatever the numbers of the processes") {
    CHECK(missing_line("7\n839\n 40  x12\n", "14952\n1 x3\n") == "");
    CHECK(missing_line("839\n", "14952\n14953\n") == "14953");
    CHECK(missing_line("502\n2\n", "502\n2\n") == "");
    CHECK(missing_line("503\n", "502\n") == "502");
    CHECK(missing_line("2 a b\n", "3 a…\n") == "");
    CHECK(missing_line("2 a b\n", "3 a\n") == "3 a");
}

TEST_CASE("the experiments of the lesson show what README.md says" *
          doctest::skip(std::getenv("SERVER") != nullptr || !have("curl") || !have("pgrep"))) {
    const TempDir dir;
    const string pidfile = dir.path + "/pid", cwd = output_of("pwd");
    const string lesson = readme_section("## Pre-fork in eight stops");
    CHECK(contains(lesson, "./server -w 2 -t 3 -p /tmp/lesson.pid\n"));
    Server server("",
                  {"-w", "2", "-t", "3", "-p", pidfile, "--pythonpath", cwd, "app_example:app"});
    REQUIRE(server.wait_ready_workers(2));
    const string port = to_string(server.port());
    size_t ran = 0, left_out = 0;
    for (size_t at = lesson.find("```sh\n"), next = 0; at != string::npos; at = next) {
        next = lesson.find("```sh\n", at + 1);
        const string part = lesson.substr(at, next - at);
        const auto block = [&](const string& fence) {
            const size_t begin = part.find(fence);
            if (begin == string::npos) { return ""s; }
            return part.substr(begin + fence.size(),
                               part.find("\n```", begin) + 1 - begin - fence.size());
        };
        string commands = block("```sh\n");
        for (const auto& [from, to] : {std::pair("/tmp/lesson.pid"s, pidfile),
                                       std::pair("127.0.0.1:8000"s, "127.0.0.1:" + port),
                                       std::pair("127.0.0.1/8000"s, "127.0.0.1/" + port)}) {
            if (contains(commands, from)) { commands = replaced(commands, from, to); }
        }
        CAPTURE(commands);
        if (contains(commands, "strace") && !have("strace")) {
            ++left_out;
            continue;
        }
        write_file(dir.path + "/commands", commands);
        const size_t logged = server.log().size();
        const string shown = output_of("timeout 30 bash " + dir.path + "/commands 2>&1");
        if (contains(shown, "Operation not permitted")) {
            ++left_out;
            continue;
        }
        CAPTURE(shown);
        CHECK(missing_line(shown, block("```text\n")) == "");
        const string log = server.log().substr(logged);
        CAPTURE(log);
        CHECK(missing_line(log, block("```log\n")) == "");
        ++ran;
    }
    CHECK(ran + left_out == 8);
    if (left_out > 0) { MESSAGE(left_out << " stops left out: strace cannot look at processes"); }
    CHECK(wait_for([&] { return processes_with(server.mark).empty(); }));
}

TEST_CASE("every function that README.md names stands in server.cpp") {
    const string source = read_file("server.cpp");
    const string lesson = readme_section("## Pre-fork in eight stops");
    size_t names = 0;
    for (size_t at = 0; (at = lesson.find("()`", at)) != string::npos; ++at) {
        const size_t begin = lesson.rfind('`', at - 1) + 1;
        string name = lesson.substr(begin, at - begin);
        name = name.substr(name.rfind(':') + 1);  // of Worker::run
        if (name == "select" || name == "accept") { continue; }
        CAPTURE(name);
        CHECK((contains(source, " " + name + "(") || contains(source, "*" + name + "(")));
        ++names;
    }
    CHECK(names > 40);
}

TEST_CASE("the runner that README.md shows whole answers" * doctest::skip(!have("perl"))) {
    const TempDir dir;
    write_file(dir.path + "/hello.pl", readme_block("perl"));
    CHECK(count(readme_block("perl"), "\n") <= 26);
    const Server server("", {"--runner", "perl " + dir.path + "/hello.pl"});
    CHECK(get(server, "/a").body == "Hello from Perl at /a\n");
    CHECK(post(server, "/b", "body").body == "Hello from Perl at /b\nbody");
    for (int i = 0; i < 20; ++i) { CHECK(get(server, "/c").status == 200); }
}

TEST_SUITE_END();

// --- what stands before the server, or starts it: nginx, HAProxy, systemd, runit, init -------
// Their parts of the configuration are those of README.md, with other addresses.
TEST_SUITE_BEGIN("peers");

TEST_CASE("behind nginx: over TCP and a unix socket, HTTP/1.0 and 1.1" *
          doctest::skip(!have("nginx"))) {
    const TempDir dir;
    const string back = dir.path + "/back", big(3000000, 'b');
    const Server server(string(kProbe) + R"py(
probe = app

def app(environ, start_response):
    if environ["PATH_INFO"] != "/broken": return probe(environ, start_response)
    start_response("200 OK", [])
    return (bytes(1 // n) for n in (1, 1, 0))
)py",
                        {"-b", "unix:" + back, "-b", "127.0.0.1:0"});
    const string block = readme_block("nginx"), newer = "proxy_http_version 1.1";
    size_t n = 0;
    for (const string& upstream : {"unix:" + back, "127.0.0.1:" + to_string(server.port())}) {
        for (const string& version : {"1.0"s, "1.1"s}) {
            CAPTURE(upstream);
            CAPTURE(version);
            const string front = dir.path + "/front" + to_string(++n);
            string paths;
            for (const char* kind : {"client_body", "proxy", "fastcgi", "uwsgi", "scgi"}) {
                paths += string(kind) + "_temp_path " + dir.path + "/" + kind + ";\n";
            }
            write_file(dir.path + "/conf",
                       "daemon off; master_process off; error_log " + dir.path + "/log; pid " +
                           dir.path + "/pid; events {} http { access_log off; " + paths +
                           "client_max_body_size 0; server { listen unix:" + front + "; " +
                           replaced(replaced(block, "unix:/run/mysite.sock", upstream), newer,
                                    "proxy_http_version " + version) +
                           "} }");
            const Program nginx({"nginx", "-e", dir.path + "/log", "-c", dir.path + "/conf"});
            REQUIRE_MESSAGE(wait_for([&] { return listens(front); }), read_file(dir.path + "/log"));
            const auto through = [&](const string& bytes) {
                Client client(front);
                client.send(bytes);
                return Reply(client.read_all());
            };
            const string fields = "Connection: close\r\n";
            const Reply plain = through(http("GET /a%20b?c", fields));
            CHECK(plain.status == 200);
            CHECK(has_line(plain.body, "PATH_INFO=/a b"));
            CHECK(has_line(plain.body, "HTTP_HOST=x"));
            CHECK(has_line(plain.body, "HTTP_X_FORWARDED_PROTO=http"));
            CHECK(has_line(plain.body, "wsgi.url_scheme=http"));
            CHECK(has_line(plain.body, "SERVER_PROTOCOL=HTTP/" + version));
            const bool tells = version == "1.1" || n > 2;  // a unix socket knows no reset
            CHECK(through(http("GET /broken", fields)).whole == !tells);
            const Reply posted = through(sized("POST /", big, fields));
            CHECK(posted.status == 200);
            CHECK(contains(posted.body, "\nbody=" + big + "\n"));
            CHECK(through(http("HEAD /", fields)).body == "");
        }
    }
    CHECK_FALSE(contains(server.log(), "[WARNING]"));
    CHECK(count(server.log(), "[ERROR]") ==
          count(server.log(), "[ERROR] Error handling request: GET /broken"));
}

TEST_CASE("behind HAProxy: send-proxy, send-proxy-v2, and its health checks" *
          doctest::skip(!have("haproxy"))) {
    const TempDir dir;
    const Server server(kProbe, {"--proxy-protocol"});
    const string block = replaced(readme_block("haproxy"), "127.0.0.1:8000",
                                  "127.0.0.1:" + to_string(server.port()));
    for (const string& how : {"send-proxy"s, "send-proxy-v2"s}) {
        CAPTURE(how);
        string port;
        const Fd front = listen_somewhere(port);
        write_file(dir.path + "/conf",
                   "global\n stats socket " + dir.path +
                       "/stats\ndefaults\n mode http\n timeout connect 5s\n timeout client 5s\n"
                       " timeout server 5s\nfrontend f\n bind fd@100\n default_backend mysite\n" +
                       replaced(block, "send-proxy-v2", how + " inter 100ms"));
        const Program haproxy({"haproxy", "-q", "-db", "-f", dir.path + "/conf"},
                              [&] { ::dup2(front.get(), 100); });
        const auto checks = [&] { return count(server.access(), "\"GET / HTTP/1.0\" 200 "); };
        const size_t before = checks();
        CHECK(wait_for([&] { return checks() > before + 2; }));
        CHECK(wait_for([&] { return exists(dir.path + "/stats"); }));
        Client client(std::atoi(port.c_str()));
        sockaddr_storage name = socket_name(client.fd.get());
        string host, own_port;
        address_text(name, host, own_port);
        client.send(http("GET /", "Connection: close\r\n"));
        const Reply reply(client.read_all());
        CHECK(reply.status == 200);
        CHECK(has_line(reply.body, "REMOTE_ADDR=127.0.0.1"));
        CHECK(has_line(reply.body, "REMOTE_PORT=" + own_port));
    }
    CHECK_FALSE(contains(server.log(), "[WARNING]"));
    CHECK_FALSE(contains(server.log(), "[ERROR]"));
    CHECK_FALSE(contains(server.access(), " 4"s + "00 "));
}

TEST_CASE("PyPy, which lacks some of os and fcntl, runs an application as well" *
          doctest::skip(!have("pypy3"))) {
    const Server server(kSystemApp, {"--python", output_of("command -v pypy3"), "-w", "1"});
    const string large(3000000, 'f');
    CHECK(get(server, "/hello").body == "hello");
    CHECK(get(server, "/descriptors").body == "[]");
    CHECK(request(server.port(), post_bytes("/forks_body", large, false)).body == "3000000");
    const Server pieces(R"py(
import platform

def app(environ, start_response):
    start_response("200 OK", [])
    return [platform.python_implementation().encode()] + 4000 * [b"1234567890"]
)py",
                        {"--python", "pypy3", "--threads", "2"});
    const Reply reply = get(pieces);
    CHECK(reply.whole);
    CHECK(reply.body.size() == 40004);
    CHECK(reply.body.compare(0, 8, "PyPy1234") == 0);
}

TEST_CASE("systemd-socket-activate hands over its socket" *
          doctest::skip(!have("systemd-socket-activate"))) {
    const TempDir dir;
    const string path = dir.path + "/s", log = dir.path + "/log";
    write_file(dir.path + "/app.py", kHello);
    const Program activated({"systemd-socket-activate", "-l", path, server_path(), "--chdir",
                             dir.path, "--python", "/usr/bin/python3", "--error-logfile", log,
                             "app:app"});
    const string listens = " 00010000 0001 01 ";  // flags, type and state of one that does
    REQUIRE(wait_for([&] {
        const string sockets = read_file("/proc/net/unix");
        const string line = sockets.substr(0, sockets.find(path + "\n"));
        return line != sockets && contains(line.substr(line.rfind('\n') + 1), listens);
    }));
    CHECK(exchange(Client(path), get_bytes("/")).body == "hello\n");
    CHECK(contains(read_file(log), "Listening at: unix:" + path));
}

pid_t child_of(pid_t pid) { return std::atoi(output_of("pgrep -oP " + to_string(pid)).c_str()); }

/// What README.md shows below `words` is "recipe" for `command`: it serves, also after a kill -9.
void check_recipe(const string& words, const string& command, bool is_init) {
    const TempDir dir;
    const string readme = read_file("README.md"), log = dir.path + "/log", path = dir.path + "/s";
    const size_t at = readme.find("\n", readme.find("```", readme.find("\n" + words + "\n"))) + 1;
    string text = readme.substr(at, readme.find("```", at) - at);
    REQUIRE(::symlink(server_path().c_str(), (dir.path + "/server").c_str()) == 0);  // no blanks
    text = replaced(text, "/usr/bin/server --chdir /srv/hello",
                    dir.path + "/server --chdir " + dir.path);
    write_file(dir.path + "/recipe", replaced(text, "-b :8080 -u nobody", "-b unix:" + path));
    write_file(dir.path + "/hello.py", kHello);
    {
        const Program started({"sh", "-c", "cd " + dir.path + " && " + command});
        for (const size_t n : {1U, 2U}) {
            REQUIRE_MESSAGE(wait_for([&] { return count(read_file(log), "Listening at:") == n; }),
                            read_file(log));
            CHECK(exchange(Client(path), get_bytes("/")).body == "hello\n");
            const pid_t parent = is_init ? child_of(started.pid) : started.pid;
            const pid_t victim = n == 1 ? child_of(parent) : is_init ? parent : 0;
            if (victim > 1) { ::kill(victim, n == 1 ? SIGKILL : SIGUSR1); }  // to init: halt
        }
    }
    if (is_init) { return; }  // it kills after a second
    CHECK(contains(read_file(log), "Shutting down: Master"));
    CHECK_FALSE(exists(path));
}

TEST_CASE("runit: the script of README.md" * doctest::skip(!have("runsv"))) {
    check_recipe(
        "runit, `/etc/sv/hello/run`, to be made executable, and `/etc/sv/hello` linked into "
        "`/etc/service`:",
        "mv recipe run && chmod +x run && exec runsv . >log 2>/dev/null", false);
}

// In a user namespace: an init that does not find its inittab would remount, when it halts, what
// the whole machine has mounted.
const string kUnshare = "unshare -rmpf --mount-proc --kill-child ";

TEST_CASE("BusyBox init: the line of README.md" *
          doctest::skip(!have("busybox") ||
                        std::system((kUnshare + "busybox true 2>/dev/null").c_str()) != 0)) {
    check_recipe("BusyBox, a line of `/etc/inittab`:",
                 "mkdir etc && mv recipe etc/inittab && exec " + kUnshare +
                     "sh -c 'mount --bind etc /etc && test -s /etc/inittab && "
                     "exec env -u CONSOLE -u console busybox init' "
                     ">log 2>&1",
                 true);
}

TEST_SUITE_END();

// --- the lab: app_example.py ----------------------------------------------------------------
TEST_SUITE_BEGIN("applications");

/// A request as a browser or curl on this machine would send it.
string lab_bytes(const string& method, const string& target, const string& fields = "",
                 const string& body = "", const string& host = "localhost:8000") {
    return method + " " + target + " HTTP/1.1\r\nHost: " + host +
           "\r\nContent-Length: " + to_string(body.size()) + "\r\n" + fields + "\r\n" + body;
}

Reply lab(const Server& server, const string& method, const string& target,
          const string& fields = "", const string& body = "") {
    return request(server.port(), lab_bytes(method, target, fields, body));
}

/// The number that a JSON text has under a name; -1: none.
int json_number(const string& text, const string& name) {
    const size_t at = text.find("\"" + name + "\": ");
    return at == string::npos ? -1 : std::atoi(text.c_str() + at + name.size() + 4);
}

int lab_runner(const Server& server) {
    return json_number(lab(server, "GET", "/whoami").body, "runner");
}

constexpr const char* kExperiments[] = {"/error", "/crash", "/hang", "/leak", "/upload"};

TEST_CASE("the lab tells which worker and runner answered: as text, as a page, as JSON") {
    const Server server(read_file("app_example.py"), {"-w", "1"});

    for (const char* accept : {"", "Accept: */*\r\n"}) {
        const Reply text = lab(server, "GET", "/", accept);
        CHECK(text.status == 200);
        CHECK(text.whole);
        CHECK(text.fields.at("content-type") == "text/plain; charset=utf-8");
        CHECK_MESSAGE(text.body.compare(0, 14, "Hello, World!\n") == 0, text.body);
        CHECK_MESSAGE(contains(text.body, "runner " + to_string(lab_runner(server))), text.body);
    }

    const string browser =
        "Accept: text/html,*/*;q=0.8\r\nX-Name: \"><script>alert(1)</script>\r\n";
    const Reply page = lab(server, "GET", "/?<script>alert(2)</script>", browser);
    CHECK(page.status == 200);
    CHECK(page.whole);
    CHECK(page.fields.at("content-type") == "text/html; charset=utf-8");
    CHECK(contains(page.fields.at("content-security-policy"), "default-src 'none'"));
    CHECK(contains(page.body, "&lt;script&gt;alert(1)&lt;/script&gt;"));
    CHECK(!contains(page.body, "<script>alert"));
    CHECK(!contains(page.body, " disabled>"));

    const Reply head = lab(server, "HEAD", "/", browser);
    CHECK(head.status == 200);
    CHECK(head.fields.at("content-type") == page.fields.at("content-type"));
    CHECK(std::atoi(head.fields.at("content-length").c_str()) > 10000);
    CHECK(head.body.empty());

    const Reply who = lab(server, "GET", "/whoami");
    CHECK(who.fields.at("content-type") == "application/json");
    const vector<pid_t> workers = server.workers(), runners = server.runners();
    REQUIRE(workers.size() == 1);
    REQUIRE(runners.size() == 1);
    CHECK(json_number(who.body, "arbiter") == server.pid);
    CHECK(json_number(who.body, "worker") == workers[0]);
    CHECK(json_number(who.body, "runner") == runners[0]);
    CHECK(json_number(who.body, "size_mib") > 0);
    if (::access("/proc/thread-self/children", R_OK) == 0) {  // not every kernel has it
        CHECK_MESSAGE(contains(who.body, "\"tree\": {\"" + to_string(workers[0]) + "\": [" +
                                             to_string(runners[0]) + "]}"),
                      who.body);
    }
    const int requests = json_number(who.body, "requests");
    CHECK(json_number(lab(server, "GET", "/whoami?slow").body, "requests") == requests + 1);

    CHECK(lab(server, "GET", "/favicon.ico").status == 404);
    CHECK(lab(server, "GET", "/favicon.ico").fields.at("content-type") ==
          "text/plain; charset=utf-8");
    CHECK(lab(server, "POST", "/whoami").status == 405);
    CHECK(lab(server, "POST", "/whoami").fields.at("allow") == "GET, HEAD");

    Client client(server);
    client.send(lab_bytes("GET", "/stream"));
    string text = client.read_until([](const string& t) { return contains(t, "line 1 of 10\n"); });
    CHECK(!contains(text, "line 10 of 10\n"));
    text += client.read_all();
    CHECK(Reply(text).whole);
    CHECK(count(Reply(text).body, " of 10\n") == 10);
}

TEST_CASE("the lab's experiments take POST, no other site's pages, and visitors of this machine") {
    struct Row {
        const char *host, *fields;
    };
    const Row refused[] = {
        {"localhost", "Origin: http://example.org\r\n"},
        {"localhost", "Origin: null\r\n"},
        {"localhost", "Origin: http://localhost:8000\r\n"},
        {"localhost", "Sec-Fetch-Site: cross-site\r\n"},
        {"localhost", "Sec-Fetch-Site: same-site\r\nOrigin: http://localhost\r\n"},
        {"localhost", "X-Forwarded-For: 127.0.0.1\r\n"},
        {"localhost", "X-Forwarded-Proto: http\r\n"},
        {"localhost", "Forwarded: for=127.0.0.1\r\n"},
        {"localhost", "X-Real-IP: 127.0.0.1\r\n"},
        {"localhost", "Via: 1.1 proxy\r\n"},
        {"example.org", "Origin: http://example.org\r\n"},  // whose address is 127.0.0.1 now
        {"127.0.0.1.example.org", ""},
        {"localhost.example.org:8000", ""},
        {"192.168.0.1", ""},
    };
    const Server server(read_file("app_example.py"), {"-w", "1", "-t", "5"});
    const int runner = lab_runner(server);
    for (const string path : kExperiments) {
        CAPTURE(path);
        for (const char* method : {"GET", "HEAD", "PUT"}) {
            const Reply reply = lab(server, method, path);
            CHECK(reply.status == 405);
            CHECK(reply.fields.at("allow") == "POST");
        }
        for (const Row& row : refused) {
            CAPTURE(string(row.host) + " " + row.fields);
            CHECK(
                request(server.port(), lab_bytes("POST", path, row.fields, "", row.host)).status ==
                403);
        }
        CHECK(request(server.port(), "POST " + path + " HTTP/1.0\r\n\r\n").status == 403);
    }
    CHECK(lab_runner(server) == runner);
    const Reply page = lab(server, "GET", "/", "Accept: text/html\r\nX-Forwarded-For: ::1\r\n");
    CHECK(contains(page.body, "switched off"));
    CHECK(contains(page.body, " disabled>"));

    for (const char* host : {"localhost", "127.0.0.1:8000", "[::1]:8000"}) {
        CAPTURE(string(host));
        const string fields = string("Sec-Fetch-Site: same-origin\r\nOrigin: http://") + host;
        CHECK(request(server.port(), lab_bytes("POST", "/upload", fields + "\r\n", "", host))
                  .status == 200);
    }
    TempDir dir;
    const string path = dir.path + "/socket";
    const Server on_socket(read_file("app_example.py"), {"-w", "1", "-b", "unix:" + path});
    Client client(path);
    client.send(lab_bytes("POST", "/upload"));
    CHECK(Reply(client.read_all()).status == 200);

    const Server open(read_file("app_example.py"), {"-w", "1", "-e", "LAB=1"});
    const string proxied = "X-Forwarded-For: 192.0.2.1\r\n", host = "example.org";
    CHECK(request(open.port(), lab_bytes("POST", "/upload", proxied, "", host)).status == 200);
    const string strange = proxied + "Origin: http://example.com\r\n";
    CHECK(request(open.port(), lab_bytes("POST", "/upload", strange, "", host)).status == 403);
}

TEST_CASE("the lab's experiments end as its page says") {
    const Server server(read_file("app_example.py"), {"-w", "1", "-t", "1"});
    int runner = lab_runner(server);
    CHECK(lab(server, "POST", "/error").status == 500);
    CHECK(server.log_has("RuntimeError: the lab was asked to raise an exception"));
    CHECK(contains(lab(server, "POST", "/leak").body, "keeps 8 MiB; its size is "));
    const int size = json_number(lab(server, "GET", "/whoami").body, "size_mib");
    CHECK(contains(lab(server, "POST", "/leak").body, "keeps 16 MiB; its size is "));
    CHECK(json_number(lab(server, "GET", "/whoami").body, "size_mib") >= size + 7);

    const string body(300'001, 'u');
    const Reply upload = lab(server, "POST", "/upload", "", body);
    CHECK(upload.status == 200);
    CHECK(json_number(upload.body, "bytes") == 300'001);
    write_file(server.dir.path + "/body", body);
    const string hash = output_of("sha256sum < " + server.dir.path + "/body | cut -c-64");
    CHECK(contains(upload.body, "\"sha256\": \"" + hash.substr(0, 64) + "\""));
    CHECK(lab_runner(server) == runner);

    for (const string path : {"/crash", "/hang"}) {
        CAPTURE(path);
        const Time start = Clock::now();
        CHECK(lab(server, "POST", path).status == (path == "/crash" ? 502 : 504));
        CHECK(seconds_since(start) < 2.5);
        const int fresh = lab_runner(server);
        CHECK(fresh > 0);
        CHECK(fresh != runner);
        runner = fresh;
        CHECK(contains(lab(server, "POST", "/leak").body, "keeps 8 MiB"));
    }
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

TEST_CASE("Flask and Django applications run under two workers") {
    const struct {
        const char *name, *source;
    } frameworks[] = {{"Flask", kFlask}, {"Django", kDjango}};
    for (const auto& row : frameworks) {
        CAPTURE(row.name);
        const Server server(row.source, {"-w", "2", "-k", "sync"});
        CHECK(get(server).body == string("Hello from ") + row.name);

        const string form = "name=Ada+Lovelace&colour=blue";
        const Reply posted = request(server.port(),
                                     "POST /form HTTP/1.1\r\nHost: x\r\nContent-Type: "
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
    const Server shown(readme_block("python"), {"-w", "1"});
    CHECK(get(shown).body == "Hello, Flask!\n");
}

TEST_SUITE_END();

}  // namespace test

/// Shares of the tests that run at a time, since most of them wait most of the time: a filter of
/// doctest, and the suites.
constexpr const char* kShares[][2] = {
    {"test-suite", "operations"},
    {"test-suite", "http,processes,lesson,applications"},
    {"test-suite-exclude", "http,operations,processes,lesson,applications"}};

/// Prints what each share has printed, once it has ended; 0 if all of them passed.
int wait_for_shares(const pid_t* pids, std::FILE* const* outputs, size_t shares) {
    int failed = 0;
    for (size_t left = shares; left > 0;) {
        int status = 1;
        const pid_t pid = ::wait(&status);
        const size_t share = static_cast<size_t>(std::find(pids, pids + shares, pid) - pids);
        if (share == shares) { continue; }  // an orphan
        --left;
        if (status != 0) { failed = 1; }
        if (outputs[share] == nullptr) { continue; }
        std::rewind(outputs[share]);
        for (int c; (c = std::getc(outputs[share])) != EOF;) { std::putchar(c); }
        std::printf("--%s=%s %s\n\n", kShares[share][0], kShares[share][1],
                    exit_text(status).c_str());
        std::fflush(stdout);
    }
    return failed;
}

int main(int argc, char** argv) {
    // As a plain shell starts a program, whatever started this one.
    for (int fd = 3; fd < 1024; ++fd) { ::close(fd); }
    for (int number = 1; number < NSIG; ++number) { ::signal(number, SIG_DFL); }
    sigset_t none;
    ::sigemptyset(&none);
    ::sigprocmask(SIG_SETMASK, &none, nullptr);
    ::umask(022);
    for (const char* name : {"LISTEN_FDS", "LISTEN_PID", "NOTIFY_SOCKET", "PORT", "TMPDIR",
                             "WEB_CONCURRENCY", "FORWARDED_ALLOW_IPS", "SCRIPT_NAME", "COLUMNS",
                             "PS_FORMAT", "CDPATH", "http_proxy", "all_proxy", "ALL_PROXY"}) {
        ::unsetenv(name);
    }
    const size_t shares = argc == 1 ? std::size(kShares) : 1;
    std::FILE* outputs[std::size(kShares)] = {};
    pid_t pids[std::size(kShares)] = {};
    // What ends as an orphan is waited for, though process 1 of this container may wait for nobody.
    ::prctl(PR_SET_CHILD_SUBREAPER, 1);
    size_t share = 0;
    for (; share < shares; ++share) {
        outputs[share] = shares > 1 ? std::tmpfile() : nullptr;
        if ((pids[share] = ::fork()) == 0) { break; }
    }
    if (share == shares) { return wait_for_shares(pids, outputs, shares); }
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    ::signal(SIGPIPE, SIG_IGN);
    doctest::Context context(argc, argv);
    if (shares > 1) {
        for (const int fd : {STDOUT_FILENO, STDERR_FILENO}) {
            ::dup2(::fileno(outputs[share]), fd);
        }
        for (size_t i = 0; i <= share; ++i) { std::fclose(outputs[i]); }
        context.addFilter(kShares[share][0], kShares[share][1]);
    }
    return context.run();
}

#endif
