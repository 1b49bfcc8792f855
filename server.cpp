// server.cpp: a pre-fork WSGI server for POSIX systems, in one C++17 file.
//
//   make && ./server                       serves app_example.py on http://127.0.0.1:8000
//   ./server mysite.wsgi -w 4 -b :8080     serves a Flask or Django project
//
//   arbiter (master)        binds, forks, watches, reloads; never reads a request
//    ├─ worker 1 (C++)      accepts, buffers, parses, answers, beats its heart
//    │   └─ runner          python3, started once, holds the WSGI application, two pipes
//    └─ worker N …
//
// The path of a request, by function:
//   accept_clients → read_client → read_head → read_body → ready ─┬→ dispatch → feed_runner
//                         ready queue: pass_on → take_from_queue ─┘       (runner: Slot.serve)
//   close ← linger ← finish ← flush ← take_reply ← read_runner ←──────────────────┘
//
// A client costs the application nothing but one complete request: the worker reads it to the
// end without blocking, waits for an idle runner (its own, or another worker's by the ready
// queue), and takes the response at the application's speed, whatever the client's.
//
//  Contents: grep '^//  [0-9]' server.cpp
//
//  Signal      arbiter                                   worker
//  TERM        graceful stop                             finish what was accepted, then leave
//  INT, QUIT   stop within a second                      leave at once
//  HUP         reload: new workers, then TERM to the old ignored
//  TTIN, TTOU  one worker more, one less                 ignored
//  CHLD        reap_workers                              reap_runner
#include <arpa/inet.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/prctl.h>
#endif

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <climits>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <deque>
#include <memory>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

extern char** environ;

namespace {

// ============================================================================
//  1. Small tools
//
//  Errors are values: a forked child must not unwind through its parent's frames,
//  and in a select loop most failures are one connection's everyday result.
//  Deadlines come from the steady clock alone; the wall clock is for people.
// ============================================================================
using std::string;
using std::string_view;
using std::to_string;
using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;
using Time = Clock::time_point;
using std::chrono::seconds;

constexpr const char* kVersion = "0.1.0";
constexpr int kWorkerBootError = 3;  // exit statuses with gunicorn's meanings
constexpr int kAppLoadError = 4;
constexpr size_t kPiece = 65536;  // bytes moved by one read, and what a frame may hold in memory

struct Error {
    int code = 0;  // an exit status or an HTTP status; 0: no error
    string text;
    explicit operator bool() const { return code != 0; }
};

template <typename T>
struct Result {
    Result(T good) : value(std::move(good)) {}
    Result(Error bad) : error(std::move(bad)) {}
    T value{};
    Error error{};
};

/// What errno says of `what`, as a start-up error.
Error os_error(const string& what) { return {1, what + ": " + std::strerror(errno)}; }

/// Owns one descriptor. close() is never retried: after EINTR the number may be another's.
class Fd {
public:
    Fd() = default;
    explicit Fd(int fd) : fd_(fd) {}
    Fd(Fd&& other) noexcept : fd_(other.release()) {}
    Fd& operator=(Fd&& other) noexcept {
        reset(other.release());
        return *this;
    }
    ~Fd() { reset(); }
    int get() const { return fd_; }
    explicit operator bool() const { return fd_ >= 0; }
    [[nodiscard]] int release() { return std::exchange(fd_, -1); }
    void reset(int fd = -1) {
        const int old = std::exchange(fd_, fd);
        if (old >= 0) { ::close(old); }
    }

private:
    int fd_ = -1;
};

/// Makes a system call again for as long as a signal interrupts it.
template <typename Call>
auto retry(Call call) {
    auto result = call();
    while (result == -1 && errno == EINTR) { result = call(); }
    return result;
}

bool would_block() { return errno == EAGAIN || errno == EWOULDBLOCK; }

/// Writes everything to a blocking descriptor; false, with errno, where that fails.
bool write_all(int fd, string_view data) {
    while (!data.empty()) {
        const ssize_t n = retry([&] { return ::write(fd, data.data(), data.size()); });
        if (n < 0) { return false; }
        data.remove_prefix(static_cast<size_t>(n));
    }
    return true;
}

/// Close-on-exec, and non-blocking if wanted. One thread forks, so setting it late is no race.
void set_flags(int fd, bool nonblocking) {
    ::fcntl(fd, F_SETFD, FD_CLOEXEC);
    if (nonblocking) { ::fcntl(fd, F_SETFL, ::fcntl(fd, F_GETFL) | O_NONBLOCK); }
}

/// Moves a descriptor that select() never sees out of the range that it needs, if there is room.
Fd raise_fd(Fd fd) {
    const int high = ::fcntl(fd.get(), F_DUPFD_CLOEXEC, FD_SETSIZE);
    return high < 0 ? std::move(fd) : Fd(high);
}

struct Pair {
    Fd first, second;
};

/// A pipe: first is read, second is written. Both close-on-exec and blocking.
Result<Pair> make_pipe() {
    int fds[2];
    if (::pipe(fds) < 0) { return os_error("cannot make a pipe"); }
    set_flags(fds[0], false);
    set_flags(fds[1], false);
    return Pair{Fd(fds[0]), Fd(fds[1])};
}

string temp_dir() {
    const char* dir = std::getenv("TMPDIR");
    return dir != nullptr && *dir != '\0' ? dir : "/tmp";
}

/// A file without a name: it goes when its last descriptor does.
Result<Fd> make_temp_file(const string& dir) {
    string path = dir + "/server-XXXXXX";
    Fd fd(::mkstemp(path.data()));
    if (!fd) { return os_error("cannot make a temporary file in " + dir); }
    ::unlink(path.c_str());
    set_flags(fd.get(), false);
    return raise_fd(std::move(fd));
}

constexpr bool is_digit(char c) { return c >= '0' && c <= '9'; }
constexpr char lower(char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c; }

/// Field names, codings and schemes are compared without case (RFC 9110 section 5.1).
bool same_name(string_view a, string_view b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                      [](char x, char y) { return lower(x) == lower(y); });
}

/// Takes optional whitespace off both ends (OWS, RFC 9110 section 5.6.3).
string_view trim(string_view text) {
    while (!text.empty() && (text.front() == ' ' || text.front() == '\t')) {
        text.remove_prefix(1);
    }
    while (!text.empty() && (text.back() == ' ' || text.back() == '\t')) { text.remove_suffix(1); }
    return text;
}

/// Cuts off and returns what stands before the first `separator`, or everything.
string_view cut(string_view& text, char separator) {
    const size_t end = std::min(text.find(separator), text.size());
    const string_view part = text.substr(0, end);
    text.remove_prefix(std::min(end + 1, text.size()));
    return part;
}

/// Reads digits and nothing else; false also where the number does not fit 63 bits.
bool parse_number(string_view text, int64_t& number, int base = 10) {
    if (text.empty() || text.front() == '-') { return false; }
    const auto [stop, problem] =
        std::from_chars(text.data(), text.data() + text.size(), number, base);
    return problem == std::errc() && stop == text.data() + text.size();
}

string to_hex(size_t number) {
    char digits[20];
    return string(digits, std::to_chars(digits, digits + sizeof digits, number, 16).ptr);
}

/// Makes bytes of a client harmless in a log: controls, quotes, backslashes and all but ASCII.
string escape(string_view text) {
    string out;
    for (const char c : text) {
        if (c == '"' || c == '\\') {
            (out += '\\') += c;
        } else if (c < 0x20 || c == 0x7f) {  // char may be signed: bytes above 0x7f are caught too
            char hex[5];
            std::snprintf(hex, sizeof hex, "\\x%02x", static_cast<unsigned char>(c));
            out += hex;
        } else {
            out += c;
        }
    }
    return out;
}

/// Bytes in the order they came: the first in memory, the rest in an unlinked temporary file.
class Spool {
public:
    /// Adds bytes, in memory up to `limit` of them there. Where the disk refuses they stay in
    /// memory all the same, and full() says so.
    void append(string_view data, size_t limit) {
        if (stored() == 0 && tail_.empty() && memory() + data.size() <= limit) {
            memory_ += data;
        } else if (!tail_.empty() || !store(data)) {
            tail_ += data;
        }
    }

    /// The next bytes, empty only at the end of all. Valid until the next call.
    string_view front() {
        if (offset_ == memory_.size()) { refill(); }
        return string_view(memory_).substr(offset_);
    }

    void pop(size_t n) { offset_ += n; }
    bool failed() const { return !tail_.empty(); }  // the disk refused
    bool full() const { return failed() || file_end_ >= (int64_t{1} << 30); }
    size_t memory() const { return memory_.size() - offset_ + tail_.size(); }
    int64_t stored() const { return file_end_ - file_begin_; }
    int64_t size() const { return stored() + static_cast<int64_t>(memory()); }
    const Fd& file() const { return file_; }
    void adopt_file(Fd file, int64_t bytes) {
        file_ = std::move(file);
        file_end_ = bytes;
    }

private:
    bool store(string_view data) {
        if (!file_) { file_ = std::move(make_temp_file(temp_dir()).value); }
        for (int64_t at = file_end_; !data.empty();) {
            const ssize_t n =
                retry([&] { return ::pwrite(file_.get(), data.data(), data.size(), at); });
            if (n < 0) { return false; }
            at += n;
            data.remove_prefix(static_cast<size_t>(n));
            if (data.empty()) { file_end_ = at; }
        }
        return true;
    }

    void refill() {
        memory_.clear();
        offset_ = 0;
        if (stored() == 0) {
            file_begin_ = file_end_ = 0;
            memory_.swap(tail_);
            return;
        }
        memory_.resize(std::min<size_t>(kPiece, static_cast<size_t>(stored())));
        const ssize_t n = retry(
            [&] { return ::pread(file_.get(), memory_.data(), memory_.size(), file_begin_); });
        memory_.resize(static_cast<size_t>(std::max<ssize_t>(n, 0)));
        file_begin_ += n > 0 ? n : stored();  // a disk that cannot be read: what it held is lost
    }

    string memory_, tail_;
    size_t offset_ = 0;
    Fd file_;
    int64_t file_begin_ = 0, file_end_ = 0;
};

// Signals come in as bytes of a pipe, so that none is lost between a test and the sleep.
Pair g_self_pipe;

void on_signal(int number) {
    const int saved = errno;
    const char byte = static_cast<char>(number);
    (void)!::write(g_self_pipe.second.get(), &byte, 1);
    errno = saved;
}

void set_signal(int number, void (*handler)(int)) {
    struct sigaction action {};
    action.sa_handler = handler;
    ::sigaction(number, &action, nullptr);
}

sigset_t block_signals(bool block) {
    sigset_t all, old;
    sigfillset(&all);
    if (!block) { sigemptyset(&all); }
    ::sigprocmask(SIG_SETMASK, &all, &old);
    return old;
}

/// A new self-pipe for this process, and handlers for the given signals.
Error open_self_pipe(std::initializer_list<int> signals) {
    Result<Pair> made = make_pipe();
    if (made.error) { return made.error; }
    g_self_pipe = std::move(made.value);
    set_flags(g_self_pipe.first.get(), true);
    set_flags(g_self_pipe.second.get(), true);
    for (const int number : signals) { set_signal(number, on_signal); }
    return {};
}

/// The next signal that has arrived, 0 for a mere wake-up, -1 if there is none.
int next_signal() {
    char byte;
    return ::read(g_self_pipe.first.get(), &byte, 1) == 1 ? byte : -1;
}

/// select() until `until`, at most; false where nothing is ready. Signals end the wait.
bool wait_ready(int max_fd, fd_set* reads, fd_set* writes, Time until) {
    const auto left = std::chrono::ceil<std::chrono::microseconds>(until - Clock::now());
    const int64_t us = std::clamp<int64_t>(left.count(), 0, 3600'000'000);
    struct timeval timeout {};
    timeout.tv_sec = static_cast<time_t>(us / 1000000);
    timeout.tv_usec = static_cast<suseconds_t>(us % 1000000);
    return ::select(max_fd + 1, reads, writes, nullptr, &timeout) > 0;
}

// ============================================================================
//  2. Settings
//
//  A default is written once, in Config; an option once, in kOptions. Parsing, --help and
//  --print-config all walk that table. Names and meanings are gunicorn's.
// ============================================================================
struct Config {
    string app = "app_example:app";
    std::vector<string> bind;
    int workers = 2;
    string worker_class = "sync";
    seconds timeout{30}, graceful_timeout{30}, header_timeout{10};
    int backlog = 2048, worker_connections = 1000;
    int limit_request_line = 4094, limit_request_fields = 100, limit_request_field_size = 8190;
    int64_t limit_request_body = int64_t{1} << 30;
    string chdir, worker_tmp_dir, accesslog, errorlog = "-", loglevel = "info";
    string access_log_format =
        "%(h)s %(l)s %(u)s %(t)s \"%(r)s\" %(s)s %(b)s \"%(f)s\" \"%(a)s\"";
    std::vector<string> pythonpath, raw_env;
    string python = "python3", runner;
    bool check_config = false, print_config = false, version = false, help = false;
};

string show(const string& value) { return value; }
string show(int value) { return to_string(value); }
string show(int64_t value) { return to_string(value); }
string show(seconds value) { return to_string(value.count()); }
string show(const std::vector<string>& values) {
    string out;
    for (const string& value : values) { out += (out.empty() ? "" : ",") + value; }
    return out;
}

template <auto Member>
string get(const Config& config) {
    return show(config.*Member);
}

template <auto Member, int64_t Low, int64_t High = INT_MAX>
Error set_number(Config& config, string_view text) {
    const bool negative = !text.empty() && text.front() == '-';
    int64_t number = 0;
    if (!parse_number(text.substr(negative ? 1 : 0), number)) {
        return {2, "'" + string(text) + "' is not a whole number"};
    }
    if (negative || number < Low || number > High) {
        return {1, string(text) + " is not between " + to_string(Low) + " and " + to_string(High)};
    }
    config.*Member = std::decay_t<decltype(config.*Member)>(number);
    return {};
}

template <auto Member>
Error set_text(Config& config, string_view text) {
    config.*Member = string(text);
    return {};
}

template <auto Member>
Error add_text(Config& config, string_view text) {
    (config.*Member).emplace_back(text);
    return {};
}

template <auto Member>
Error set_flag(Config& config, string_view) {
    config.*Member = true;
    return {};
}

Error set_workers(Config& config, string_view text) {
    if (text != "auto") { return set_number<&Config::workers, 1, 1000>(config, text); }
    config.workers = static_cast<int>(std::max(1L, ::sysconf(_SC_NPROCESSORS_ONLN)));
    return {};
}

Error set_worker_class(Config&, string_view text) {
    if (text == "sync") { return {}; }
    return {1, "only 'sync' workers exist here, not '" + string(text) + "'"};
}

constexpr const char* kLevels[] = {"debug", "info", "warning", "error", "critical"};

Error set_loglevel(Config& config, string_view text) {
    config.loglevel = text;
    for (const char* level : kLevels) {
        if (text == level) { return {}; }
    }
    return {1, "'" + string(text) + "' is none of debug, info, warning, error, critical"};
}

Error set_env(Config& config, string_view text) {
    if (text.find('=') == string::npos || text.front() == '=') {
        return {1, "'" + string(text) + "' is not NAME=VALUE"};
    }
    return add_text<&Config::raw_env>(config, text);
}

struct Option {
    char letter;
    const char *name, *meta, *help;  // meta nullptr: takes no value
    Error (*set)(Config&, string_view);
    string (*get)(const Config&);
};

constexpr int64_t kYear = 31'536'000, kMost = INT64_MAX;

using C = Config;
constexpr Option kOptions[] = {
    {'b', "bind", "ADDRESS", "HOST:PORT, [V6]:PORT, :PORT, unix:PATH or fd://N; may be repeated",
     add_text<&C::bind>, get<&C::bind>},
    {'w', "workers", "N", "worker processes, or 'auto': one a processor; also $WEB_CONCURRENCY",
     set_workers, get<&C::workers>},
    {'k', "worker-class", "NAME", "accepted for gunicorn's sake: sync", set_worker_class,
     get<&C::worker_class>},
    {'t', "timeout", "SECONDS", "end an app or a worker that is silent for so long; 0: never",
     set_number<&C::timeout, 0, kYear>, get<&C::timeout>},
    {0, "graceful-timeout", "SECONDS", "what a stopping worker gets to finish its requests",
     set_number<&C::graceful_timeout, 0, kYear>, get<&C::graceful_timeout>},
    {0, "header-timeout", "SECONDS", "what a client gets to send the head of its request",
     set_number<&C::header_timeout, 1, kYear>, get<&C::header_timeout>},
    {0, "backlog", "N", "connections that the kernel holds before they are accepted",
     set_number<&C::backlog, 1, 65535>, get<&C::backlog>},
    {0, "worker-connections", "N", "connections that one worker holds",
     set_number<&C::worker_connections, 1>, get<&C::worker_connections>},
    {0, "limit-request-line", "BYTES", "longest request line; 0: only the 1 MiB cap on the head",
     set_number<&C::limit_request_line, 0, 1 << 20>, get<&C::limit_request_line>},
    {0, "limit-request-fields", "N", "most header fields",
     set_number<&C::limit_request_fields, 1, 32768>, get<&C::limit_request_fields>},
    {0, "limit-request-field_size", "BYTES", "longest header field; 0: the default",
     set_number<&C::limit_request_field_size, 0, 1 << 20>, get<&C::limit_request_field_size>},
    {0, "limit-request-body", "BYTES", "longest request body; 0: no limit",
     set_number<&C::limit_request_body, 0, kMost>, get<&C::limit_request_body>},
    {0, "chdir", "DIR", "change to this directory first", set_text<&C::chdir>, get<&C::chdir>},
    {0, "pythonpath", "DIR", "a directory, or several with commas, to import the app from",
     add_text<&C::pythonpath>, get<&C::pythonpath>},
    {'e', "env", "NAME=VALUE", "set a variable of the app's environment; may be repeated",
     set_env, get<&C::raw_env>},
    {0, "worker-tmp-dir", "DIR", "where heartbeat files live; else /dev/shm, $TMPDIR or /tmp",
     set_text<&C::worker_tmp_dir>, get<&C::worker_tmp_dir>},
    {0, "access-logfile", "FILE", "write an access log; -: to stdout", set_text<&C::accesslog>,
     get<&C::accesslog>},
    {0, "access-logformat", "FORMAT", "its lines", set_text<&C::access_log_format>,
     get<&C::access_log_format>},
    {0, "error-logfile", "FILE", "where messages and all output of the app go; -: stderr",
     set_text<&C::errorlog>, get<&C::errorlog>},
    {0, "log-file", "FILE", "the same as --error-logfile", set_text<&C::errorlog>, nullptr},
    {0, "log-level", "LEVEL", "debug, info, warning, error or critical", set_loglevel,
     get<&C::loglevel>},
    {0, "python", "PATH", "the Python to run the app with", set_text<&C::python>,
     get<&C::python>},
    {0, "runner", "CMD", "a program to answer requests in place of Python", set_text<&C::runner>,
     get<&C::runner>},
    {0, "check-config", nullptr, "check all settings, load the app, and exit",
     set_flag<&C::check_config>, nullptr},
    {0, "print-config", nullptr, "print all settings and exit", set_flag<&C::print_config>,
     nullptr},
    {'v', "version", nullptr, "print the version and exit", set_flag<&C::version>, nullptr},
    {'h', "help", nullptr, "print this help and exit", set_flag<&C::help>, nullptr},
};

Error set_option(Config& config, const Option& option, string_view value) {
    Error error = option.set(config, value);
    if (error) { error.text = string("--") + option.name + ": " + error.text; }
    return error;
}

/// What the environment sets, gunicorn's names; the command line wins over it.
Error read_environment(Config& config) {
    const char* count = std::getenv("WEB_CONCURRENCY");
    if (count == nullptr || *count == '\0') { return {}; }
    const Error error = set_workers(config, count);
    return error ? Error{1, "WEB_CONCURRENCY: " + error.text} : error;
}

/// `arg` as an option: -x VALUE, -xVALUE, --name VALUE or --name=VALUE. `next` is the argument
/// after it, or nullptr; `used_next` tells whether it was the value.
Error parse_option(Config& config, string_view arg, const char* next, bool& used_next) {
    const bool is_long = arg.substr(0, 2) == "--";
    const size_t end = is_long ? std::min(arg.find('='), arg.size()) : 2;
    const string_view name = is_long ? arg.substr(2, end - 2) : arg.substr(1, 1);
    const bool attached = arg.size() > end;
    for (const Option& option : kOptions) {
        if (is_long ? name != option.name : option.letter != name.front()) { continue; }
        if (option.meta == nullptr) {
            if (attached) { return {2, string(arg) + ": this option takes no value"}; }
            return set_option(config, option, "");
        }
        if (attached) { return set_option(config, option, arg.substr(end + (is_long ? 1 : 0))); }
        if (next == nullptr) { return {2, string(arg) + ": expected a value"}; }
        used_next = true;
        return set_option(config, option, next);
    }
    return {2, "unknown option: " + string(arg)};
}

Error parse_command_line(const std::vector<const char*>& args, Config& config) {
    bool options = true, have_app = false;
    for (size_t i = 0; i < args.size(); ++i) {
        const string_view arg = args[i];
        if (options && arg == "--") {
            options = false;
        } else if (options && arg.size() > 1 && arg.front() == '-') {
            bool used_next = false;
            const char* next = i + 1 < args.size() ? args[i + 1] : nullptr;
            if (Error error = parse_option(config, arg, next, used_next)) { return error; }
            i += used_next ? 1 : 0;
        } else if (std::exchange(have_app, true)) {
            return {2, "one application only, not also '" + string(arg) + "'"};
        } else {
            config.app = arg;
        }
    }
    const char* port = std::getenv("PORT");
    if (config.bind.empty()) {
        config.bind = {port != nullptr && *port ? string("0.0.0.0:") + port : "127.0.0.1:8000"};
    }
    if (config.limit_request_field_size == 0) {
        config.limit_request_field_size = Config{}.limit_request_field_size;
    }
    return {};
}

void print_help() {
    Config defaults;
    (void)parse_command_line({}, defaults);
    std::puts("usage: server [OPTIONS] [MODULE:CALLABLE]\n\n"
              "Serves a WSGI application, app_example:app unless another is named.\n");
    for (const Option& option : kOptions) {
        const string letter = option.letter != 0 ? string("-") + option.letter + ", " : "    ";
        const string meta = option.meta != nullptr ? string(" ") + option.meta : "";
        const string value = option.get != nullptr ? option.get(defaults) : "";
        std::printf("  %s--%s%s\n        %s%s%s%s\n", letter.c_str(), option.name, meta.c_str(),
                    option.help, value.empty() ? "" : " [", value.c_str(),
                    value.empty() ? "" : "]");
    }
}

void print_config(const Config& config) {
    std::printf("%-25s = %s\n", "app", config.app.c_str());
    for (const Option& option : kOptions) {
        if (option.get != nullptr) {
            std::printf("%-25s = %s\n", option.name, option.get(config).c_str());
        }
    }
}

// ============================================================================
//  3. Logs
//
//  A line is one write, so that lines of several processes never mix. Whatever a client
//  sent is escaped before it gets here.
// ============================================================================
enum class Level { Debug, Info, Warning, Error, Critical };

struct Logger {
    Fd error_file, access_file;
    Level level = Level::Info;
    int error_fd() const { return error_file ? error_file.get() : STDERR_FILENO; }
};
Logger g_log;

string local_time(const char* format) {
    const time_t now = std::time(nullptr);
    struct tm parts {};
    ::localtime_r(&now, &parts);
    char text[64];
    return string(text, std::strftime(text, sizeof text, format, &parts));
}

__attribute__((format(printf, 2, 3))) void log(Level level, const char* format, ...) {
    if (level < g_log.level) { return; }
    va_list args, again;
    va_start(args, format);
    va_copy(again, args);
    string text(static_cast<size_t>(std::vsnprintf(nullptr, 0, format, args)), '\0');
    std::vsnprintf(text.data(), text.size() + 1, format, again);
    va_end(again);
    va_end(args);
    string name = kLevels[static_cast<int>(level)];
    for (char& c : name) { c = static_cast<char>(c - 32); }
    const string line = local_time("[%Y-%m-%d %H:%M:%S %z] [") + to_string(::getpid()) + "] [" +
                        name + "] " + text + "\n";
    (void)write_all(g_log.error_fd(), line);
}

/// Opens the log files named in `config`, or opens them again; "-" is stderr or stdout.
Error open_logs(const Config& config) {
    for (int i = 0; i < 5; ++i) {
        if (config.loglevel == kLevels[i]) { g_log.level = static_cast<Level>(i); }
    }
    const auto open_log = [](const string& path, int standard, Fd& file) -> Error {
        if (path.empty()) { return {}; }
        Fd fd(path == "-" ? ::fcntl(standard, F_DUPFD_CLOEXEC, FD_SETSIZE)
                          : ::open(path.c_str(), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666));
        if (!fd && path == "-") { fd.reset(::fcntl(standard, F_DUPFD_CLOEXEC, 3)); }
        if (!fd) { return os_error("cannot open the log " + path); }
        file = raise_fd(std::move(fd));
        return {};
    };
    if (Error error = open_log(config.errorlog, STDERR_FILENO, g_log.error_file)) { return error; }
    return open_log(config.accesslog, STDOUT_FILENO, g_log.access_file);
}

/// The value of a name in an environ block: NAME NUL value NUL …
string_view lookup(string_view block, string_view name) {
    while (!block.empty()) {
        const string_view key = cut(block, '\0'), value = cut(block, '\0');
        if (key == name) { return value; }
    }
    return {};
}

/// The user of a Basic authorization, empty if there is none (RFC 7617 section 2).
string basic_user(string_view credentials) {
    if (!same_name(cut(credentials, ' '), "basic")) { return ""; }
    static constexpr string_view kAlphabet =
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    string text;
    uint32_t bits = 0;
    int count = 0;
    for (const char c : trim(credentials)) {
        const size_t digit = kAlphabet.find(c);
        if (digit == string::npos) { break; }
        bits = bits << 6 | static_cast<uint32_t>(digit);
        count += 6;
        if (count >= 8) {
            count -= 8;
            text += static_cast<char>(bits >> count & 0xff);
        }
    }
    const size_t colon = text.find(':');
    return colon == string::npos ? "" : text.substr(0, colon);
}

/// What an access-log line tells of one request.
struct Access {
    string_view env;   // the environ block; for a request that was refused perhaps only a part
    string_view head;  // of the response
    string line;       // the request line as sent, escaped like all atoms when it is written
    string peer;
    int status = 0;
    int64_t body_bytes = 0;
    std::chrono::microseconds took{};
};

/// The value of the field `name` in a response head, empty if there is none.
string_view head_field(string_view head, string_view name) {
    while (!head.empty()) {
        string_view line = cut(head, '\n');
        if (!line.empty() && line.back() == '\r') { line.remove_suffix(1); }
        if (same_name(cut(line, ':'), name)) { return trim(line); }
    }
    return {};
}

/// "user-agent" as the environ's HTTP_USER_AGENT (RFC 3875 section 4.1.18).
string environ_name(string_view field) {
    string name;
    for (const char c : field) {
        name += c == '-' ? '_' : c >= 'a' && c <= 'z' ? static_cast<char>(c - 32) : c;
    }
    return name == "CONTENT_TYPE" || name == "CONTENT_LENGTH" ? name : "HTTP_" + name;
}

/// One atom: "h", "{referer}i" … An unknown one, or one without a value, is "-".
string access_atom(string_view name, const Access& a) {
    string value;
    if (name.size() > 3 && name.front() == '{') {
        const string_view key = name.substr(1, name.size() - 3);
        if (name.back() == 'i') { value = lookup(a.env, environ_name(key)); }
        if (name.back() == 'o') { value = head_field(a.head, key); }
        if (name.back() == 'e') { value = lookup(a.env, key); }
        return value.empty() ? "-" : escape(value);
    }
    const int64_t us = a.took.count();
    switch (name.size() == 1 ? name.front() : '\0') {
        case 'h': value = a.peer; break;
        case 'u': value = basic_user(lookup(a.env, "HTTP_AUTHORIZATION")); break;
        case 't': value = local_time("[%d/%b/%Y:%H:%M:%S %z]"); break;
        case 'r': value = a.line; break;
        case 'm': value = lookup(a.env, "REQUEST_METHOD"); break;
        case 'U': value = lookup(a.env, "PATH_INFO"); break;
        case 'q': return escape(lookup(a.env, "QUERY_STRING"));
        case 'H': value = lookup(a.env, "SERVER_PROTOCOL"); break;
        case 's': value = to_string(a.status); break;
        case 'B': value = to_string(a.body_bytes); break;
        case 'b': value = a.body_bytes != 0 ? to_string(a.body_bytes) : "-"; break;
        case 'f': value = lookup(a.env, "HTTP_REFERER"); break;
        case 'a': value = lookup(a.env, "HTTP_USER_AGENT"); break;
        case 'T': value = to_string(us / 1000000); break;
        case 'M': value = to_string(us / 1000); break;
        case 'D': value = to_string(us); break;
        case 'L': {
            const string digits = to_string(1000000 + us % 1000000);
            value = to_string(us / 1000000) + "." + digits.substr(1);
            break;
        }
        case 'p': value = "<" + to_string(::getpid()) + ">"; break;
        default: break;
    }
    return value.empty() ? "-" : escape(value);
}

/// A line of `format` with its %(atom)s replaced; other text stays as it is.
string access_line(string_view format, const Access& access) {
    string line;
    while (!format.empty()) {
        const size_t end = format.substr(0, 2) == "%(" ? format.find(")s") : string::npos;
        if (end == string::npos) {
            line += format.front();
            format.remove_prefix(1);
        } else {
            line += access_atom(format.substr(2, end - 2), access);
            format.remove_prefix(end + 2);
        }
    }
    return line + "\n";
}

// ============================================================================
//  4. Listeners
//
//  The arbiter binds once, before the first fork; every worker inherits the sockets.
// ============================================================================
struct Address {
    string host, port, path;  // path: of a unix socket
    int fd = -1;              // of fd://N
    bool v6 = false;
};

/// Reads HOST:PORT, HOST, :PORT, [V6]:PORT, unix:PATH or fd://N, as gunicorn does.
Result<Address> parse_address(string_view text) {
    Address address;
    int64_t number = 0;
    if (text.substr(0, 5) == "fd://") {
        if (!parse_number(text.substr(5), number) || number > INT_MAX) {
            return Error{1, "'" + string(text) + "' names no descriptor"};
        }
        address.fd = static_cast<int>(number);
        return address;
    }
    if (text.substr(0, 5) == "unix:") {
        address.path = text.substr(text.substr(5, 2) == "//" ? 7 : 5);
        if (address.path.empty() || address.path.size() >= sizeof(sockaddr_un::sun_path)) {
            return Error{1, "'" + string(text) + "' is no path for a unix socket"};
        }
        return address;
    }
    address.v6 = !text.empty() && text.front() == '[';
    const size_t host_end = address.v6 ? text.find(']') : text.rfind(':');
    string_view rest = text.substr(std::min(text.size(), host_end + (address.v6 ? 1 : 0)));
    if (host_end == string::npos) { rest = {}; }
    address.host = address.v6 ? text.substr(1, host_end - 1) : text.substr(0, host_end);
    address.port = rest.empty() ? "8000" : string(rest.substr(1));
    const bool host_ok = address.v6 ? host_end != string::npos
                                    : address.host.find(':') == string::npos;
    if (!host_ok || text.empty() || (!rest.empty() && rest.front() != ':') ||
        !parse_number(address.port, number) || number > 65535) {
        return Error{1, "'" + string(text) + "' is no address: HOST:PORT, port 0 to 65535"};
    }
    return address;
}

struct Listener {
    Fd fd;
    string text;              // as in the log: http://127.0.0.1:8000, unix:/run/app.sock
    string path;              // of a unix socket that is ours to remove
    string host, port;        // SERVER_NAME and SERVER_PORT
    bool is_unix = false;
    bool wildcard = false;    // bound to all addresses: each connection has its own
    pid_t owner = ::getpid(); // a forked child must not remove the path
};

/// The numeric host and port of a socket address; both empty for a unix socket.
std::pair<string, string> address_text(const sockaddr_storage& address) {
    char host[INET6_ADDRSTRLEN] = "";
    uint16_t port = 0;
    if (address.ss_family == AF_INET) {
        const auto& v4 = reinterpret_cast<const sockaddr_in&>(address);
        ::inet_ntop(AF_INET, &v4.sin_addr, host, sizeof host);
        port = ntohs(v4.sin_port);
    } else if (address.ss_family == AF_INET6) {
        const auto& v6 = reinterpret_cast<const sockaddr_in6&>(address);
        ::inet_ntop(AF_INET6, &v6.sin6_addr, host, sizeof host);
        port = ntohs(v6.sin6_port);
    }
    return {host, *host != '\0' ? to_string(port) : ""};
}

std::pair<string, string> socket_name(int fd) {
    sockaddr_storage address{};
    socklen_t size = sizeof address;
    ::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size);
    return address_text(address);
}

/// Fills in what the log and the environ need, and makes the descriptor fit for select().
Result<Listener> describe(Listener listener) {
    sockaddr_storage address{};
    socklen_t size = sizeof address;
    int listening = 0;
    socklen_t flag_size = sizeof listening;
    if (::getsockname(listener.fd.get(), reinterpret_cast<sockaddr*>(&address), &size) < 0 ||
        ::getsockopt(listener.fd.get(), SOL_SOCKET, SO_ACCEPTCONN, &listening, &flag_size) < 0 ||
        listening == 0) {
        return Error{1, "descriptor " + to_string(listener.fd.get()) + " is no listening socket"};
    }
    listener.is_unix = address.ss_family == AF_UNIX;
    if (listener.is_unix) {
        const auto& un = reinterpret_cast<const sockaddr_un&>(address);
        listener.text = string("unix:") + un.sun_path;
    } else {
        std::tie(listener.host, listener.port) = address_text(address);
        const bool v6 = address.ss_family == AF_INET6;
        listener.wildcard = listener.host == (v6 ? "::" : "0.0.0.0");
        listener.text = "http://" + (v6 ? "[" + listener.host + "]" : listener.host) + ":" +
                        listener.port;
    }
    set_flags(listener.fd.get(), true);
    return listener;
}

/// Makes way for a unix socket: removes a stale one, never a live one or another kind of file.
Error clear_path(const string& path, const sockaddr_un& address) {
    struct stat info {};
    if (::lstat(path.c_str(), &info) < 0) { return {}; }
    if (!S_ISSOCK(info.st_mode)) { return {1, path + " exists and is no socket"}; }
    const Fd probe(::socket(AF_UNIX, SOCK_STREAM, 0));
    set_flags(probe.get(), true);
    if (::connect(probe.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0 ||
        errno != ECONNREFUSED) {
        return {1, "cannot listen on unix:" + path + ": another server does"};
    }
    ::unlink(path.c_str());
    return {};
}

Result<Listener> bind_unix(const Address& address, int backlog) {
    sockaddr_un name{};
    name.sun_family = AF_UNIX;
    address.path.copy(name.sun_path, sizeof name.sun_path - 1);
    if (Error error = clear_path(address.path, name)) { return error; }
    Listener listener;
    listener.fd = Fd(::socket(AF_UNIX, SOCK_STREAM, 0));
    const mode_t mask = ::umask(0);  // gunicorn's default: anyone may connect
    const bool bound = ::bind(listener.fd.get(), reinterpret_cast<sockaddr*>(&name),
                              sizeof name) == 0 &&
                       ::listen(listener.fd.get(), backlog) == 0;
    ::umask(mask);
    if (!bound) { return os_error("cannot listen on unix:" + address.path); }
    listener.path = address.path;
    return describe(std::move(listener));
}

/// Binds one address and listens.
Result<Listener> bind_address(const Address& address, int backlog) {
    if (!address.path.empty()) { return bind_unix(address, backlog); }
    Listener listener;
    if (address.fd >= 0) {
        listener.fd = Fd(address.fd);
        return describe(std::move(listener));
    }
    const string text = "cannot listen on " + address.host + ":" + address.port;
    struct addrinfo hints {}, *found = nullptr;
    hints.ai_family = address.v6 ? AF_INET6 : AF_INET;
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
    const int problem = ::getaddrinfo(address.host.empty() ? nullptr : address.host.c_str(),
                                      address.port.c_str(), &hints, &found);
    if (problem != 0) { return Error{1, text + ": " + ::gai_strerror(problem)}; }
    const std::unique_ptr<addrinfo, void (*)(addrinfo*)> owner(found, ::freeaddrinfo);
    const int on = 1;
    listener.fd = Fd(::socket(found->ai_family, SOCK_STREAM, 0));
    ::setsockopt(listener.fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (address.v6) {
        ::setsockopt(listener.fd.get(), IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof on);
    }
    if (::bind(listener.fd.get(), found->ai_addr, found->ai_addrlen) < 0 ||
        ::listen(listener.fd.get(), backlog) < 0) {
        return os_error(text);
    }
    return describe(std::move(listener));
}

// ============================================================================
//  5. Request: bytes to meaning
//
//  Nothing here touches a socket: input is a view of what has arrived so far. The same
//  bytes give the same result, whole or one by one. RFC 9112 throughout, and strict.
// ============================================================================
enum class Parse { Done, NeedMore, Bad };

constexpr size_t kMaxHead = size_t{1} << 20;       // bytes in a head, whatever the limits say
constexpr size_t kMaxChunkLine = size_t{8} << 10;  // bytes in a chunk-size line

struct Request {
    string method, target, path, query, host;
    int minor = 0;  // HTTP/1.minor, 0 or 1
    std::vector<std::pair<string, string>> fields;  // by environ name; repeated ones are joined
    int64_t length = -1;                            // Content-Length; -1: none
    bool chunked = false, expect_continue = false;
};

/// tchar (RFC 9110 section 5.6.2).
bool is_token(string_view text) {
    return !text.empty() && std::all_of(text.begin(), text.end(), [](char c) {
        return is_digit(c) || (lower(c) >= 'a' && lower(c) <= 'z') ||
               (c != '\0' && std::strchr("!#$%&'*+-.^_`|~", c) != nullptr);
    });
}

/// No controls but tab: the rule for field values (RFC 9110 section 5.5).
bool is_field_value(string_view text) {
    return std::none_of(text.begin(), text.end(), [](char c) {
        return (static_cast<unsigned char>(c) < 0x20 && c != '\t') || c == 0x7f;
    });
}

int hex_value(char c) {
    return is_digit(c) ? c - '0' : lower(c) >= 'a' && lower(c) <= 'f' ? lower(c) - 'a' + 10 : -1;
}

/// Decodes %XX; what is malformed stays as it is. False for %00.
bool percent_decode(string_view text, string& out) {
    for (size_t i = 0; i < text.size(); ++i) {
        const int high = text[i] == '%' && i + 2 < text.size() ? hex_value(text[i + 1]) : -1;
        const int low = high >= 0 ? hex_value(text[i + 2]) : -1;
        if (low < 0) {
            out += text[i];
        } else if (high + low == 0) {
            return false;
        } else {
            out += static_cast<char>(high * 16 + low);
            i += 2;
        }
    }
    return true;
}

/// host [ ":" port ] (RFC 3986 section 3.2.2); empty is a valid host.
bool is_host(string_view text) {
    const bool literal = !text.empty() && text.front() == '[';
    const size_t end = literal ? text.find(']') : std::min(text.find(':'), text.size());
    if (end == string::npos) { return false; }
    string_view port = text.substr(end + (literal ? 1 : 0));
    if (!port.empty() && (port.front() != ':' || !std::all_of(port.begin() + 1, port.end(),
                                                              is_digit))) {
        return false;
    }
    const string_view name = literal ? text.substr(1, end - 1) : text.substr(0, end);
    for (size_t i = 0; i < name.size(); ++i) {
        const char c = name[i];
        if (c == '%') {
            if (i + 2 >= name.size() || hex_value(name[i + 1]) < 0 || hex_value(name[i + 2]) < 0) {
                return false;
            }
        } else if (!(is_digit(c) || (lower(c) >= 'a' && lower(c) <= 'z') ||
                     (c != '\0' && std::strchr("-._~!$&'()*+,;=", c) != nullptr) ||
                     (literal && c == ':'))) {
            return false;
        }
    }
    return !literal || !name.empty();
}

/// Cuts a field line in two (RFC 9112 section 5). False: obs-fold, a blank before the colon,
/// no name, or controls.
bool split_field(string_view line, string_view& name, string_view& value) {
    const size_t colon = line.find(':');
    if (colon == string::npos) { return false; }
    name = line.substr(0, colon);
    value = trim(line.substr(colon + 1));
    return is_token(name) && is_field_value(value);
}

/// Reads the head of a request. Call parse() with all that has come so far, again with more.
class HeadParser {
public:
    explicit HeadParser(const Config& config) : config_(config) {}

    /// Done: `request` is complete and size() tells the bytes of the head. Bad: see error().
    Parse parse(string_view data, Request& request) {
        while (true) {
            const size_t end = data.find('\n', scanned_);
            scanned_ = end == string::npos ? data.size() : end + 1;
            string_view line = data.substr(start_, std::min(end, data.size()) - start_);
            const bool crlf = !line.empty() && line.back() == '\r';
            if (crlf) { line.remove_suffix(1); }
            error_ = check_size(line.size());
            if (!error_ && end == string::npos) { return Parse::NeedMore; }
            if (!error_ && !crlf) { error_ = {400, "a line ends without CR"}; }
            if (error_) { return Parse::Bad; }
            start_ = scanned_;
            if (line.empty() && lines_ > 0) {
                error_ = finish(request);
                return error_ ? Parse::Bad : Parse::Done;
            }
            if (line.empty() && !std::exchange(skipped_, true)) { continue; }
            error_ = lines_++ == 0 ? take_request_line(line, request) : take_field(line, request);
            if (error_) { return Parse::Bad; }
        }
    }

    size_t size() const { return start_; }
    const Error& error() const { return error_; }

private:
    Error check_size(size_t line) const {
        const int limit = lines_ > 0 ? config_.limit_request_field_size : config_.limit_request_line;
        if ((limit == 0 || line <= static_cast<size_t>(limit)) && start_ + line <= kMaxHead) {
            return {};
        }
        return lines_ > 0 ? Error{431, "a header field is too long"}
                          : Error{414, "the request line is too long"};
    }

    /// method SP request-target SP HTTP-version (RFC 9112 section 3).
    static Error take_request_line(string_view line, Request& r) {
        r.method = cut(line, ' ');
        r.target = cut(line, ' ');
        const bool lower_case = std::any_of(r.method.begin(), r.method.end(),
                                            [](char c) { return c >= 'a' && c <= 'z'; });
        if (r.method.size() < 3 || r.method.size() > 20 || lower_case || !is_token(r.method)) {
            return {400, "not a request method"};
        }
        if (r.target.empty() || r.target.find('\t') != string::npos || !is_field_value(r.target)) {
            return {400, "not a request target"};
        }
        if (Error error = take_version(line, r)) { return error; }
        return take_target(r);
    }

    /// "HTTP/" DIGIT "." DIGIT (RFC 9112 section 2.3); 1.2 and the like are served as 1.1.
    static Error take_version(string_view version, Request& r) {
        string_view numbers = version.substr(std::min<size_t>(5, version.size()));
        if (version.substr(0, 5) != "HTTP/" || numbers.empty()) { return {400, "no HTTP version"}; }
        const bool dot = numbers.find('.') != string::npos;
        const string_view major = cut(numbers, '.');
        int64_t ignored;
        if (!parse_number(major, ignored) || (dot && !parse_number(numbers, ignored))) {
            return {400, "not an HTTP version"};
        }
        if (major != "1" || numbers.size() != 1) { return {505, "not HTTP/1"}; }
        r.minor = numbers == "0" ? 0 : 1;
        return {};
    }

    /// Origin, absolute and asterisk form (RFC 9112 section 3.2).
    static Error take_target(Request& r) {
        if (r.method == "CONNECT") { return {501, "CONNECT is for proxies"}; }
        string_view rest = r.target;
        if (rest.front() != '/' && rest != "*") {
            const size_t scheme = rest.find("://");
            const string_view name = rest.substr(0, std::min(scheme, rest.size()));
            if (scheme == string::npos || (!same_name(name, "http") && !same_name(name, "https"))) {
                return {400, "not a request target"};
            }
            rest.remove_prefix(scheme + 3);
            const size_t end = std::min(rest.find_first_of("/?#"), rest.size());
            r.host = rest.substr(0, end);
            if (r.host.empty() || !is_host(r.host)) { return {400, "not a host in the target"}; }
            rest.remove_prefix(end);
        } else if (rest == "*" && r.method != "OPTIONS") {
            return {400, "* is for OPTIONS"};
        }
        rest = rest.substr(0, rest.find('#'));
        const string_view path = cut(rest, '?');
        r.query = rest;
        if (!percent_decode(path.empty() ? "/" : path, r.path)) { return {400, "NUL in the path"}; }
        return {};
    }

    Error take_field(string_view line, Request& r) {
        string_view name, value;
        if (lines_ - 1 > config_.limit_request_fields) { return {431, "too many header fields"}; }
        if (!split_field(line, name, value)) { return {400, "not a header field"}; }
        if (name.find('_') != string::npos || same_name(name, "proxy")) { return {}; }
        const string key = environ_name(name);
        const auto known = std::find_if(r.fields.begin(), r.fields.end(),
                                        [&](const auto& field) { return field.first == key; });
        const bool again = known != r.fields.end();
        if (key == "HTTP_HOST" && (again || !is_host(value))) { return {400, "not one good Host"}; }
        if (key == "CONTENT_TYPE" && again) { return {400, "two Content-Types"}; }
        if (key == "CONTENT_LENGTH") {
            if (again || !parse_number(value, r.length)) { return {400, "not a Content-Length"}; }
        }
        if (again) {
            (known->second += key == "HTTP_COOKIE" ? "; " : ",") += value;
        } else {
            r.fields.emplace_back(key, value);
        }
        return {};
    }

    /// What only the whole head tells: how the body is framed (RFC 9112 section 6), Expect.
    static Error finish(Request& r) {
        for (auto& [name, value] : r.fields) {
            if (name == "HTTP_HOST" && !r.host.empty()) { value = r.host; }
            if (name == "HTTP_TRANSFER_ENCODING") {
                if (Error error = take_coding(value, r)) { return error; }
            }
            if (name == "HTTP_EXPECT") {
                if (!same_name(value, "100-continue")) { return {417, "not an expectation"}; }
                r.expect_continue = r.minor > 0;
            }
        }
        const auto is_host_field = [](const auto& field) { return field.first == "HTTP_HOST"; };
        if (!r.host.empty() && std::none_of(r.fields.begin(), r.fields.end(), is_host_field)) {
            r.fields.emplace_back("HTTP_HOST", r.host);
        }
        return {};
    }

    /// Exactly one `chunked`, on HTTP/1.1, without a Content-Length: all else could be read in
    /// two ways, which is how requests are smuggled (RFC 9112 section 6.1).
    static Error take_coding(string_view value, Request& r) {
        int chunked = 0, others = 0;
        bool last = false;
        if (r.minor == 0 || r.length >= 0) { return {400, "Transfer-Encoding is not for here"}; }
        do {
            const string_view coding = trim(cut(value, ','));
            if (!is_token(coding)) { return {400, "not a transfer coding"}; }
            last = same_name(coding, "chunked");
            (last ? chunked : others)++;
        } while (!value.empty());
        if (chunked > 1 || (chunked == 1 && !last)) { return {400, "chunked is not last"}; }
        if (others > 0) { return {501, "a transfer coding other than chunked"}; }
        r.chunked = true;
        return {};
    }

    const Config& config_;
    size_t scanned_ = 0, start_ = 0;  // where to look for the next LF; where its line begins
    int lines_ = 0;                   // the request line and field lines seen
    bool skipped_ = false;            // one empty line before the request is allowed
    Error error_;
};

/// Reads a body by its framing: Content-Length or chunks (RFC 9112 sections 6.2 and 7.1).
class BodyReader {
public:
    explicit BodyReader(const Config& config) : config_(config) {}

    void start(const Request& request) {
        part_ = request.chunked ? Part::Size : Part::Data;
        chunked_ = request.chunked;
        left_ = std::max<int64_t>(request.length, 0);
    }

    /// Takes from the front of `in`, and gives at most one piece of data. NeedMore without a
    /// piece: wait for more bytes, and keep what is left in `in`.
    Parse next(string_view& in, string_view& piece) {
        piece = {};
        while (true) {
            if (part_ == Part::Data) {
                piece = in.substr(0, static_cast<size_t>(std::min<int64_t>(
                                         left_, static_cast<int64_t>(in.size()))));
                in.remove_prefix(piece.size());
                left_ -= static_cast<int64_t>(piece.size());
                if (left_ == 0 && !chunked_) { part_ = Part::End; }
                if (left_ == 0 && chunked_) { part_ = Part::DataEnd; }
                if (left_ > 0 || !piece.empty()) { return Parse::NeedMore; }
            }
            if (part_ == Part::End) { return Parse::Done; }
            string_view line;
            const Parse found = take_line(in, line);
            if (found != Parse::Done) { return found; }
            if (!take(line)) { return Parse::Bad; }
        }
    }

    bool chunked() const { return chunked_; }
    const Error& error() const { return error_; }

private:
    enum class Part { Data, End, Size, DataEnd, Trailers };

    Parse take_line(string_view& in, string_view& line) {
        const size_t end = in.find('\n');
        const size_t limit = part_ == Part::Size      ? kMaxChunkLine
                             : part_ == Part::DataEnd ? 0
                                                      : static_cast<size_t>(
                                                            config_.limit_request_field_size);
        const size_t size = std::min(end, in.size());
        const bool crlf = size > 0 && in[size - 1] == '\r';
        if (size - (crlf ? 1 : 0) > limit) {
            error_ = part_ == Part::Trailers ? Error{431, "a trailer field is too long"}
                                             : Error{400, "not a chunk"};
            return Parse::Bad;
        }
        if (end == string::npos) { return Parse::NeedMore; }
        if (!crlf) {
            error_ = {400, "a line ends without CR"};
            return Parse::Bad;
        }
        line = in.substr(0, end - 1);
        in.remove_prefix(end + 1);
        return Parse::Done;
    }

    bool take(string_view line) {
        if (part_ == Part::DataEnd) {
            part_ = Part::Size;
        } else if (part_ == Part::Size) {
            const string_view size = line.substr(0, line.find_first_of("; \t"));
            const string_view extension = trim(line.substr(size.size()));
            const bool clean = extension.empty() || extension.front() == ';';
            if (size.size() > 16 || !clean || !is_field_value(line) ||
                !parse_number(size, left_, 16)) {
                error_ = {400, "not a chunk size"};
            }
            part_ = left_ > 0 ? Part::Data : Part::Trailers;
        } else if (line.empty()) {
            part_ = Part::End;
        } else {
            string_view name, value;
            if (++trailers_ > config_.limit_request_fields) {
                error_ = {431, "too many trailer fields"};
            } else if (!split_field(line, name, value) || same_name(name, "content-length") ||
                       same_name(name, "transfer-encoding") || same_name(name, "host")) {
                error_ = {400, "not a trailer field"};
            }
        }
        return !error_;
    }

    const Config& config_;
    Part part_ = Part::Data;
    bool chunked_ = false;
    int64_t left_ = 0;  // bytes of the body or of the chunk still to come
    int trailers_ = 0;
    Error error_;
};

/// Where a connection came in: SERVER_NAME, SERVER_PORT, REMOTE_ADDR, REMOTE_PORT.
struct Endpoints {
    string server, server_port, peer, peer_port;
};

/// The environ block of PEP 3333, but for CONTENT_LENGTH: NAME NUL value NUL …
string make_environ(const Request& r, const Endpoints& ends) {
    const char* script = std::getenv("SCRIPT_NAME");
    string_view prefix = script != nullptr ? script : "", path = r.path;
    const bool inside = path.substr(0, prefix.size()) == prefix &&
                        (path.size() == prefix.size() || path[prefix.size()] == '/');
    if (inside) { path.remove_prefix(prefix.size()); }
    string block;
    block.reserve(1024);
    const auto add = [&block](string_view name, string_view value) {
        ((block += name) += '\0') += value;
        block += '\0';
    };
    add("REQUEST_METHOD", r.method);
    add("SCRIPT_NAME", inside ? prefix : "");
    add("PATH_INFO", path);
    add("QUERY_STRING", r.query);
    add("RAW_URI", r.target);
    add("REQUEST_URI", r.target);
    add("SERVER_PROTOCOL", r.minor > 0 ? "HTTP/1.1" : "HTTP/1.0");
    add("SERVER_NAME", ends.server);
    add("SERVER_PORT", ends.server_port);
    add("REMOTE_ADDR", ends.peer);
    add("REMOTE_PORT", ends.peer_port);
    for (const auto& [name, value] : r.fields) {
        if (name != "CONTENT_LENGTH") { add(name, value); }
    }
    return block;
}

// ============================================================================
//  6. Response: what the application said, checked, and the head that the client gets
// ============================================================================
const char* reason(int status) {
    switch (status) {
        case 400: return "Bad Request";
        case 408: return "Request Timeout";
        case 413: return "Content Too Large";
        case 414: return "URI Too Long";
        case 417: return "Expectation Failed";
        case 431: return "Request Header Fields Too Large";
        case 500: return "Internal Server Error";
        case 501: return "Not Implemented";
        case 502: return "Bad Gateway";
        case 503: return "Service Unavailable";
        case 504: return "Gateway Timeout";
        case 505: return "HTTP Version Not Supported";
        case 507: return "Insufficient Storage";
        default: return "Error";
    }
}

struct Response {
    int status = 0;  // 0: nothing has been said yet
    string line, fields;
    int64_t length = -1;  // Content-Length; -1: none
    bool has_date = false, has_server = false;
    string dropped;  // names of hop-by-hop fields that the application may not set
};

/// Reads "Status: 200 OK\nName: value\n…" as a runner sends it. An error says what is wrong.
Error parse_response(string_view head, Response& r) {
    if (cut(head, ' ') != "Status:") { return {500, "no status"}; }
    r.line = cut(head, '\n');
    int64_t status = 0;
    if (r.line.size() < 4 || r.line[3] != ' ' || !is_field_value(r.line) ||
        !parse_number(string_view(r.line).substr(0, 3), status) || status < 200) {
        return {500, "the status '" + escape(r.line) + "'"};
    }
    while (!head.empty()) {
        const string_view line = cut(head, '\n'), name = line.substr(0, line.find(':'));
        string_view ignored, value;
        if (!split_field(line, ignored, value)) {
            return {500, "the header field '" + escape(name) + "'"};
        }
        if (same_name(name, "content-length")) {
            if (r.length >= 0 || !parse_number(value, r.length)) {
                return {500, "the Content-Length '" + escape(value) + "'"};
            }
            if (status == 204) { continue; }  // RFC 9110 section 8.6
        }
        bool hop = false;
        for (const char* each : {"connection", "keep-alive", "proxy-authenticate", "te", "trailer",
                                 "proxy-authorization", "trailers", "transfer-encoding",
                                 "upgrade"}) {
            hop = hop || same_name(name, each);
        }
        if (hop) {
            (r.dropped += r.dropped.empty() ? "" : ", ") += name;
            continue;
        }
        r.has_date = r.has_date || same_name(name, "date");
        r.has_server = r.has_server || same_name(name, "server");
        (((r.fields += name) += ": ") += value) += "\r\n";
    }
    r.status = static_cast<int>(status);
    return {};
}

/// The head as it goes to the client; IMF-fixdate as in RFC 9110 section 5.6.7.
string final_head(const Response& r, int minor, bool chunked) {
    static time_t last = 0;
    static char date[40];
    const time_t now = std::time(nullptr);
    if (now != last) {
        struct tm parts {};
        ::gmtime_r(&now, &parts);
        std::strftime(date, sizeof date, "Date: %a, %d %b %Y %H:%M:%S GMT\r\n", &parts);
        last = now;
    }
    string head = minor > 0 ? "HTTP/1.1 " : "HTTP/1.0 ";
    head.reserve(200 + r.fields.size());
    (head += r.line) += "\r\n";
    if (!r.has_server) { head += "Server: server\r\n"; }
    if (!r.has_date) { head += date; }
    head += "Connection: close\r\n";
    head += r.fields;
    if (chunked) { head += "Transfer-Encoding: chunked\r\n"; }
    return head += "\r\n";
}

/// The server's own answer; it echoes nothing of the request.
Response error_response(int status, string& body) {
    Response r;
    r.status = status;
    r.line = to_string(status) + " " + reason(status);
    body = r.line + "\n";
    r.length = static_cast<int64_t>(body.size());
    r.fields = "Content-Type: text/plain\r\nContent-Length: " + to_string(r.length) + "\r\n";
    if (status == 503) { r.fields += "Retry-After: 10\r\n"; }
    return r;
}

// ============================================================================
//  7. Bridge: the runner, and the pipes to it
//
//  worker → runner   N:CONTENT_LENGTH NUL len NUL NAME NUL value NUL … ,body   one request (SCGI)
//                    0:,     the client has gone; only after a whole body, ignored when idle
//  runner → worker   0:,     once: the application is loaded
//                    N:Status: 200 OK\nName: value\n\n…,  N:more body,  …  0:,   one response (CGI)
//                    0:!     instead of 0:, where it failed; without a head the worker says 500
//  N: the bytes up to the comma, in decimal. An empty len: the client sent no length. Any program
//  that speaks this on its standard input and output is a runner.
// ============================================================================
constexpr char kRunner[] = R"py(
import faulthandler, fcntl, importlib, io, os, select, sys


class Body(io.RawIOBase):
    """What of a request's body has not come with its head; inert once the request is over."""

    def __init__(self, slot):
        self.slot = slot

    def readable(self):
        return True

    def readinto(self, buffer):
        data = self.slot.take(len(buffer)) if self.slot and self.slot.left else b""
        buffer[:len(data)] = data
        return len(data)


class FileWrapper:
    """wsgi.file_wrapper (PEP 3333, Optional Platform-Specific File Handling)."""

    def __init__(self, file, block_size=65536):
        self.file, self.block_size = file, max(block_size, 65536)
        if hasattr(file, "close"):
            self.close = file.close

    def __iter__(self):
        return iter(lambda: self.file.read(self.block_size) or None, None)


class Response:
    """start_response() and write() of one request."""

    def __init__(self, slot):
        self.slot, self.head, self.started = slot, None, False

    def start_response(self, status, headers, exc_info=None):
        if exc_info:
            try:
                if self.started:
                    raise exc_info[1].with_traceback(exc_info[2])
            finally:
                exc_info = None  # no circular reference to the traceback
        elif self.head is not None:
            raise AssertionError("start_response was called twice")
        if not isinstance(status, str):
            raise TypeError("the status is not a str: %r" % (status,))
        lines = ["Status: " + status]
        for name, value in headers:
            if not isinstance(name, str) or not isinstance(value, str):
                raise TypeError("a header is not of str: %r" % ((name, value),))
            if ":" in name:
                raise ValueError("a colon in the header name %r" % (name,))
            lines.append(name + ": " + value)
        head = "\n".join(lines) + "\n\n"
        if head.count("\n") != len(lines) + 1:
            raise ValueError("a line break in the status or a header: %r" % (lines,))
        self.head = head.encode("latin-1")
        return self.write

    def frame(self, data):
        """The netstring for a piece of the body, the head before the first."""
        if not isinstance(data, bytes):
            raise TypeError("the response is of bytes, not %r" % type(data))
        if self.head is None:
            raise AssertionError("start_response was not called")
        if not self.started:
            data = self.head + data
            self.started = True
        return b"%d:%b," % (len(data), data) if data else b""

    def send(self, data):
        if data or not isinstance(data, bytes):  # headers wait for the first non-empty piece
            self.slot.write(self.frame(data))

    def write(self, data):
        if self.slot is None:
            return
        if self.slot.client_gone():
            raise BrokenPipeError("the client has gone")
        self.send(data)


class Slot:
    """A pair of pipes and the loop that answers what comes through them."""

    def __init__(self, requests, replies, app):
        self.requests, self.replies, self.app = requests, replies, app
        self.pending = b""  # read and not used
        self.left = 0       # bytes of the body that the application has not read
        self.gone = False
        self.poll = select.poll()
        self.poll.register(requests, select.POLLIN)

    def write(self, data):
        sent = os.write(self.replies, data)
        while sent < len(data):
            sent += os.write(self.replies, memoryview(data)[sent:])

    def more(self):
        data = os.read(self.requests, 65536)
        if not data:
            sys.exit()  # the worker has gone or wants no more
        self.pending += data

    def netstring(self):
        while True:
            size, colon, rest = self.pending.partition(b":")
            if colon and len(rest) > int(size):
                size = int(size)
                self.pending = rest[size + 1:]
                return rest[:size]
            self.more()

    def take(self, size):
        """At most `size` bytes of the body."""
        if not self.pending:
            self.more()
        data = self.pending[:min(size, self.left)]
        self.pending = self.pending[len(data):]
        self.left -= len(data)
        return data

    def client_gone(self):
        if not self.gone and not self.left:
            if not self.pending and self.poll.poll(0):
                self.more()
            if self.pending.startswith(b"0:,"):
                self.pending, self.gone = self.pending[3:], True
        return self.gone

    def serve(self, base):
        while True:
            block = self.netstring().decode("latin-1").split("\0")
            if len(block) == 1:
                continue  # "the client has gone", too late
            environ = dict(base)
            environ.update(zip(block[::2], block[1::2]))
            self.left, self.gone, body = int(environ["CONTENT_LENGTH"] or 0), False, None
            if not environ["CONTENT_LENGTH"]:
                del environ["CONTENT_LENGTH"]
            if self.left <= len(self.pending):
                environ["wsgi.input"] = io.BytesIO(self.pending[:self.left])
                self.pending, self.left = self.pending[self.left:], 0
            else:
                body = Body(self)
                environ["wsgi.input"] = io.BufferedReader(body, 65536)
            response = Response(self)
            self.answer(environ, response)
            response.slot = None
            while self.left:
                self.take(65536)
            if body:
                body.slot = None

    def answer(self, environ, response):
        items = None
        try:
            try:
                items = self.app(environ, response.start_response)
                if isinstance(items, (list, tuple)):
                    for item in items:
                        if not isinstance(item, bytes):
                            response.frame(item)
                    self.write(response.frame(b"".join(items)) + b"0:,")
                    return
                for item in items:
                    response.send(item)
                    if self.client_gone():
                        break
                self.write((b"" if response.started else response.frame(b"")) + b"0:,")
            except Exception:
                report()
                self.write(b"0:!")
        finally:
            try:
                if hasattr(items, "close"):
                    items.close()
            except Exception:
                report()


def report():
    import traceback
    os.write(2, traceback.format_exc().encode("utf-8", "backslashreplace"))


def load(name):
    """MODULE, MODULE:OBJ.ATTR or MODULE:FACTORY(...) as in gunicorn."""
    module, _, target = name.partition(":")
    app = eval(target or "application", vars(importlib.import_module(module)))
    if not callable(app):
        raise TypeError("%s is not callable" % name)
    return app


def main(name, paths, software):
    faulthandler.enable()  # SIGABRT, and crashes, print the stack of every thread
    high = min(1000, os.sysconf("SC_OPEN_MAX") // 2)
    pipes = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, high) for fd in (0, 1)]
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)

    def leave_pipes():  # a child that the application forks has no part in the bridge
        null = os.open(os.devnull, os.O_RDWR)
        for fd in pipes:
            os.dup2(null, fd, False)
        os.close(null)

    os.register_at_fork(after_in_child=leave_pipes)
    sys.path[:1] = [os.path.abspath(path) for path in paths.split(",") if path] + [os.getcwd()]
    try:
        app = load(name)
    except Exception:
        report()
        sys.exit(4)
    slot = Slot(pipes[0], pipes[1], app)
    slot.write(b"0:,")
    slot.serve({
        "wsgi.version": (1, 0), "wsgi.url_scheme": "http", "wsgi.errors": sys.stderr,
        "wsgi.multithread": False, "wsgi.multiprocess": True, "wsgi.run_once": False,
        "wsgi.file_wrapper": FileWrapper, "wsgi.input_terminated": True,
        "SERVER_SOFTWARE": software})
)py";

/// Tells what frames of a runner mean, piece by piece, however the bytes arrive.
class NetstringReader {
public:
    enum class Event { NeedMore, Piece, End, Failed, Bad };

    /// Takes from the front of `in`. Piece: part of a payload, perhaps not all of it.
    Event next(string_view& in, string_view& piece) {
        while (!in.empty()) {
            if (left_ > 0) {
                piece = in.substr(0, std::min(left_, in.size()));
                in.remove_prefix(piece.size());
                left_ -= piece.size();
                return Event::Piece;
            }
            const char c = in.front();
            in.remove_prefix(1);
            if (in_payload_) {
                in_payload_ = false;
                if (size_ == 0 && c == '!') { return Event::Failed; }
                if (c != ',') { return Event::Bad; }
                if (std::exchange(size_, 0) == 0) { return Event::End; }
            } else if (is_digit(c) && digits_ < 12) {
                size_ = size_ * 10 + static_cast<size_t>(c - '0');
                ++digits_;
            } else if (c == ':' && digits_ > 0) {
                left_ = size_;
                in_payload_ = true;
                digits_ = 0;
            } else {
                return Event::Bad;
            }
        }
        return Event::NeedMore;
    }

private:
    size_t size_ = 0, left_ = 0;
    int digits_ = 0;
    bool in_payload_ = false;
};

enum class Phase { Down, Booting, Idle, Busy, Dying };

struct Connection;

/// A runner process, its slot (a pair of pipes) and the request in it.
struct Runner {
    Phase phase = Phase::Down;
    pid_t pid = -1;
    Fd to, from;
    NetstringReader reader;
    string outgoing;                 // a request's netstring, what is left of it
    Spool body;                      // and its body behind it
    Connection* current = nullptr;   // null: nobody waits for this response any more
    string request;                  // its request line, for the log
    bool answered = false;           // its end frame has come
    bool tell_gone = false;          // owes the runner a "0:,"
    Time since{};                    // when the request went out
    Time deadline = Time::max();     // of the next frame
    Time kill_at = Time::max();      // SIGKILL for a runner that was asked to go
    int signal = 0;                  // the last signal that we sent it
};

/// A Python literal for any bytes, so that settings travel in the source and not in the environ.
string python_literal(string_view text) {
    string out = "__import__('os').fsdecode(bytes.fromhex('";
    for (const char c : text) {
        char hex[3];
        std::snprintf(hex, sizeof hex, "%02x", static_cast<unsigned char>(c));
        out += hex;
    }
    return out + "'))";
}

/// In the forked child: becomes the runner, or says why not. Only its two pipes go with it.
[[noreturn]] void exec_runner(const Config& config, int in, int out, const string& boot,
                              pid_t worker, rlim_t files) {
    for (int number = 1; number < NSIG; ++number) { set_signal(number, SIG_DFL); }
    ::setpgid(0, 0);
    ::dup2(in, STDIN_FILENO);
    ::dup2(out, STDOUT_FILENO);
    if (g_log.error_file) { ::dup2(g_log.error_file.get(), STDERR_FILENO); }
    for (const char* name : {"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "NOTIFY_SOCKET",
                             "WATCHDOG_PID", "WATCHDOG_USEC"}) {
        ::unsetenv(name);
    }
    struct rlimit limit {};
    ::getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = files;
    ::setrlimit(RLIMIT_NOFILE, &limit);
#ifdef __linux__
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
#endif
    if (::getppid() != worker) { ::_exit(0); }
    block_signals(false);
    const string label = "server: runner [" + config.app + "]";
    const string command = "exec " + config.runner;
    if (config.runner.empty()) {
        ::execlp(config.python.c_str(), config.python.c_str(), "-u", "-c", boot.c_str(),
                 label.c_str(), nullptr);
    } else {
        ::execl("/bin/sh", "sh", "-c", command.c_str(), nullptr);
    }
    log(Level::Error, "cannot run %s: %s", config.python.c_str(), std::strerror(errno));
    ::_exit(kWorkerBootError);
}

/// Starts a runner that imports the application. `files`: its soft limit on descriptors.
Error start_runner(const Config& config, Runner& runner, rlim_t files) {
    Result<Pair> requests = make_pipe(), replies = make_pipe();
    if (requests.error) { return requests.error; }
    if (replies.error) { return replies.error; }
    const string source = kRunner + ("\nmain(" + python_literal(config.app) + ", ") +
                          python_literal(show(config.pythonpath)) + ", 'server/" + kVersion +
                          "')\n";
    const string boot = "import sys; exec(compile(sys.stdin.buffer.read(" +
                        to_string(source.size()) + "), '<server runner>', 'exec'), {})";
    set_flags(requests.value.second.get(), true);  // a pipe holds the source before anyone reads
    if (config.runner.empty() && !write_all(requests.value.second.get(), source)) {
        return os_error("cannot feed the runner");
    }
    const pid_t worker = ::getpid();
    const sigset_t mask = block_signals(true);
    const pid_t pid = ::fork();
    if (pid == 0) {
        exec_runner(config, requests.value.first.get(), replies.value.second.get(), boot, worker,
                    files);
    }
    ::sigprocmask(SIG_SETMASK, &mask, nullptr);
    if (pid < 0) { return os_error("cannot fork"); }
    ::setpgid(pid, pid);  // here too: a signal to its group may be due before it runs
    runner = Runner{};
    runner.phase = Phase::Booting;
    runner.pid = pid;
    runner.to = std::move(requests.value.second);
    runner.from = std::move(replies.value.first);
    set_flags(runner.from.get(), true);
    return {};
}

/// "exited with status 1", "was ended by signal 9 (Killed)".
string exit_text(int status) {
    if (!WIFSIGNALED(status)) { return "exited with status " + to_string(WEXITSTATUS(status)); }
    const int number = WTERMSIG(status);
    return "was ended by signal " + to_string(number) + " (" + ::strsignal(number) + ")";
}

// ============================================================================
//  8. Connection: what the worker knows of one client
//
//  ReadHead → ReadBody → Ready → Run → Reply → Linger → Done; a refused request goes straight
//  to Reply. Only Worker::set_state() assigns the state, and the deadline with it.
// ============================================================================
enum class State { ReadHead, ReadBody, Ready, Run, Reply, Linger, Done };

constexpr auto kPatience = 1ms;             // how long a request waits for its own worker's runner
constexpr auto kLingerSilence = 2s;         // as nginx's lingering_close on
constexpr auto kLingerTotal = 10s;
constexpr auto kKillDelay = 500ms;          // from asking a runner to go to SIGKILL
constexpr size_t kReplyMemory = size_t{1} << 20, kWorkerMemory = size_t{16} << 20;

/// The part of a connection that goes through the ready queue as it is.
struct Passport {
    Time accepted, started;           // connected; request complete
    int64_t length = -1;              // of the body, where the client told; -1: CONTENT_LENGTH empty
    int64_t stored = 0;               // bytes of the body that are in a file
    size_t env_size = 0;
    int minor = 0;                    // HTTP/1.minor
    bool head_only = false;           // HEAD: the response has no body
    bool more = false, eof = false;   // sent more than its request; has half-closed
};

struct Connection {
    explicit Connection(const Config& config) : head(config), reader(config) {}
    Fd socket;
    State state = State::ReadHead;
    Time deadline{};
    Passport pass;
    Endpoints ends;
    string in;                        // read and not yet understood
    HeadParser head;
    Request request;
    BodyReader reader;
    string env;                       // environ block, complete once the head is
    Spool body, out;                  // the request's body; what the client has not taken yet
    string app_head, final_head;      // the head as the app sends it, and as the client gets it
    Response response;
    int64_t left = -1;                // of the response's Content-Length; -1: none
    bool chunked = false, complete = false;
    bool too_long = false;            // the application sent more than it announced
    bool broken = false;              // the response must end visibly cut
    int64_t body_bytes = 0;
    size_t counted = 0;               // bytes of `out` in Worker::reply_memory_

    string request_line() const {
        if (env.empty()) { return in.substr(0, in.find_first_of("\r\n")); }
        return string(lookup(env, "REQUEST_METHOD")) + " " + string(lookup(env, "RAW_URI")) + " " +
               string(lookup(env, "SERVER_PROTOCOL"));
    }
};

/// Sends one datagram with descriptors (SCM_RIGHTS); false where the queue is full.
bool send_message(int queue, string_view data, const int* fds, size_t count) {
    alignas(cmsghdr) char control[CMSG_SPACE(3 * sizeof(int))] = {};
    struct iovec part = {const_cast<char*>(data.data()), data.size()};
    struct msghdr message {};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = static_cast<decltype(message.msg_controllen)>(
        CMSG_SPACE(count * sizeof(int)));
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = static_cast<decltype(header->cmsg_len)>(CMSG_LEN(count * sizeof(int)));
    std::memcpy(CMSG_DATA(header), fds, count * sizeof(int));
    return retry([&] { return ::sendmsg(queue, &message, MSG_DONTWAIT); }) >= 0;
}

/// Receives one datagram and its descriptors; the size, or -1 where there is none.
ssize_t receive_message(int queue, char* data, size_t size, std::vector<Fd>& fds) {
    alignas(cmsghdr) char control[CMSG_SPACE(3 * sizeof(int))];
    struct iovec part = {data, size};
    struct msghdr message {};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    const ssize_t n = retry([&] { return ::recvmsg(queue, &message, MSG_DONTWAIT); });
    const cmsghdr* header = n < 0 ? nullptr : CMSG_FIRSTHDR(&message);
    if (header == nullptr || header->cmsg_type != SCM_RIGHTS) { return n; }
    const size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) {
        int fd;
        std::memcpy(&fd, CMSG_DATA(header) + i * sizeof fd, sizeof fd);
        set_flags(fd, false);
        fds.emplace_back(fd);
    }
    return n;
}

// ============================================================================
//  9. Worker: one select loop between clients, the ready queue and the runner
// ============================================================================

/// The heartbeat: an unlinked file whose ctime the arbiter reads. The mode also says "booted".
class WorkerTmp {
public:
    WorkerTmp() = default;
    explicit WorkerTmp(Fd fd) : fd_(std::move(fd)) {}
    void notify(bool booted) {
        spinner_ = !spinner_;
        ::fchmod(fd_.get(), static_cast<mode_t>((booted ? 2 : 0) + (spinner_ ? 1 : 0)));
    }
    /// When it last beat (in the file system's time, to be compared with nothing else).
    struct timespec last_update(bool& booted) const {
        struct stat info {};
        ::fstat(fd_.get(), &info);
        booted = (info.st_mode & 2) != 0;
        return info.st_ctim;
    }

private:
    Fd fd_;
    bool spinner_ = false;
};

/// What every worker of every generation inherits: a request waits here for an idle runner.
struct ReadyQueue {
    Fd in, out;
};

class Worker {
public:
    Worker(const Config& config, std::vector<Listener>& listeners, ReadyQueue& queue,
           WorkerTmp& tmp, Fd arbiter, rlim_t files)
        : config_(config), listeners_(listeners), queue_(queue), tmp_(tmp),
          arbiter_(std::move(arbiter)), arbiter_pid_(::getppid()), files_(files) {}

    /// Serves until it is told to stop; returns the exit status.
    int run() {
        if (Error error = init_process()) {
            log(Level::Error, "Worker cannot boot: %s", error.text.c_str());
            return kWorkerBootError;
        }
        while (!finished()) {
            fd_set reads = reads_, writes = writes_;
            const Time until = prepare(reads, writes);
            const bool any = wait_ready(max_fd_, &reads, &writes, until);
            now_ = Clock::now();
            if (!any) {
                FD_ZERO(&reads);
                FD_ZERO(&writes);
            }
            turn(reads, writes);
        }
        log(Level::Info, "Worker exiting (pid: %d)", ::getpid());
        return status_;
    }

private:
    // --- life ---------------------------------------------------------------

    Error init_process() {
        log(Level::Info, "Booting worker with pid: %d", ::getpid());
        FD_ZERO(&reads_);
        FD_ZERO(&writes_);
        if (Error error = init_signals()) { return error; }
        watch(g_self_pipe.first.get(), true, false);
        max_fd_ = std::max(max_fd_, queue_.out.get());
        for (const Listener& listener : listeners_) {
            max_fd_ = std::max(max_fd_, listener.fd.get());
        }
        notify();
        return restart_runner();
    }

    static Error init_signals() {
        for (const int number : {SIGHUP, SIGUSR1, SIGUSR2, SIGWINCH, SIGTTIN, SIGTTOU, SIGPIPE}) {
            set_signal(number, SIG_IGN);
        }
        const Error error = open_self_pipe({SIGTERM, SIGINT, SIGQUIT, SIGCHLD});
        set_signal(SIGABRT, SIG_DFL);
        block_signals(false);
        return error;
    }

    void notify() {
        tmp_.notify(booted_);
        const auto half = std::chrono::milliseconds(config_.timeout) / 2;
        next_notify_ = now_ + (half > 0ms ? std::min<std::chrono::milliseconds>(half, 1s) : 1s);
    }

    bool finished() {
        return runner_.phase == Phase::Down && (status_ != 0 || !has_work());
    }

    /// Whether a runner is still wanted.
    bool has_work() const {
        return !quick_ && (!stopping_ || connected_ > 0 || !queue_is_empty());
    }

    void handle_signals() {
        for (int number; (number = next_signal()) >= 0;) {
            if (number == SIGCHLD) { reap_runner(); }
            if (number == SIGTERM) { stop(); }
            if (number == SIGINT || number == SIGQUIT) { stop_now(); }
        }
    }

    /// Graceful: what has been accepted is served, also by the kernel; then the listener closes.
    void stop() {
        if (std::exchange(stopping_, true)) { return; }
        if (booted_) { accept_clients(config_.backlog); }
        listeners_.clear();
        for (const auto& c : connections_) {
            if (c && c->state == State::ReadHead && c->in.empty()) {
                c->deadline = std::min(c->deadline, now_ + 1s);  // silent; but perhaps on its way
            }
        }
        next_tick_ = now_;
    }

    void stop_now() {
        stopping_ = quick_ = true;
        listeners_.clear();
        if (runner_.phase != Phase::Down) { dismiss_runner(kKillDelay / 2); }
    }

    // --- the loop -----------------------------------------------------------

    /// Completes the sets with what depends on the runner, and says when to wake at the latest.
    Time prepare(fd_set& reads, fd_set& writes) {
        Time until = std::min(next_tick_, next_notify_);
        if (runner_.from && !stalled()) { FD_SET(runner_.from.get(), &reads); }
        if (runner_.to && (!runner_.outgoing.empty() || runner_.body.size() > 0)) {
            FD_SET(runner_.to.get(), &writes);
        }
        if (runner_.phase == Phase::Idle) { FD_SET(queue_.out.get(), &reads); }
        if (!ready_.empty()) { until = std::min(until, next_pass_); }
        accepting_ = booted_ && now_ >= accept_again_;
        if (runner_.phase != Phase::Idle && accepting_) {
            // An idle worker may have it first: so not all wake for one connection.
            accepting_ = runner_.phase != Phase::Busy || now_ >= runner_.since + kPatience;
            if (!accepting_) { until = std::min(until, runner_.since + kPatience); }
        }
        for (const Listener& listener : listeners_) {
            if (accepting_) { FD_SET(listener.fd.get(), &reads); }
        }
        return until;
    }

    void turn(const fd_set& reads, const fd_set& writes) {
        const auto is_set = [](const Fd& fd, const fd_set& set) {
            return fd && FD_ISSET(fd.get(), &set);
        };
        if (FD_ISSET(g_self_pipe.first.get(), &reads)) { handle_signals(); }
        if (is_set(runner_.to, writes)) { feed_runner(); }
        if (is_set(runner_.from, reads)) { read_runner(); }
        if (runner_.phase == Phase::Idle && FD_ISSET(queue_.out.get(), &reads)) {
            if (Connection* c = take_from_queue()) { dispatch(*c); }
        }
        for (int fd = 0; fd <= max_fd_; ++fd) {
            Connection* c = connections_[fd].get();
            if (c == nullptr) { continue; }
            if (FD_ISSET(fd, &writes)) { flush(*c); }
            if (FD_ISSET(fd, &reads) && c->state != State::Done) { read_client(*c); }
            settle(*c);
        }
        for (const Listener& listener : listeners_) {
            if (accepting_ && FD_ISSET(listener.fd.get(), &reads)) {
                accept_clients(16);
                break;
            }
        }
        if (now_ >= next_pass_) { pass_on(); }
        if (now_ >= next_notify_) { notify(); }
        if (now_ >= next_tick_) { tick(); }
        if (runner_.to && !has_work()) {
            dismiss_runner(quick_ || !booted_ ? 0s : config_.graceful_timeout);
        }
    }

    /// Deadlines of all kinds. They need no sharper clock than the wake-ups they ask for.
    void tick() {
        next_tick_ = now_ + 1s;
        if (::getppid() != arbiter_pid_) { stop_now(); }
        for (const auto& c : connections_) {
            if (!c) { continue; }
            if (now_ >= c->deadline) { expire(*c); }
            if (c->state != State::Done) { next_tick_ = std::min(next_tick_, c->deadline); }
            settle(*c);
        }
        if (now_ >= runner_.deadline) { hung_app(); }
        if (now_ >= runner_.kill_at) { signal_runner(SIGKILL); }
        if (runner_.phase == Phase::Down && now_ >= restart_at_ && has_work()) {
            if (Error error = restart_runner()) { log(Level::Error, "%s", error.text.c_str()); }
        }
        if (runner_.phase != Phase::Idle) { expire_queue(); }
        for (const Time due : {runner_.deadline, runner_.kill_at, restart_at_}) {
            if (due > now_) { next_tick_ = std::min(next_tick_, due); }
        }
    }

    void watch(int fd, bool read, bool write) {
        read ? FD_SET(fd, &reads_) : FD_CLR(fd, &reads_);
        write ? FD_SET(fd, &writes_) : FD_CLR(fd, &writes_);
        max_fd_ = std::max(max_fd_, fd);
    }

    /// After any event of a connection: the sets, the memory it uses, and its end.
    void settle(Connection& c) {
        reply_memory_ += c.out.memory() - c.counted;
        c.counted = c.out.memory();
        const int fd = c.socket.get();
        if (c.state != State::Done) { return watch(fd, !c.pass.eof, c.out.size() > 0); }
        watch(fd, false, false);
        reply_memory_ -= c.counted;
        --connected_;
        connections_[fd].reset();
    }

    void set_state(Connection& c, State state) {
        const auto in = [this](auto time) { return time > 0s ? now_ + time : Time::max(); };
        c.state = state;
        switch (state) {
            case State::ReadHead: c.deadline = c.pass.accepted + config_.header_timeout; break;
            case State::ReadBody: c.deadline = in(config_.timeout); break;
            case State::Ready: c.deadline = in(config_.timeout); break;
            case State::Run: c.deadline = Time::max(); break;  // the runner's counts
            case State::Reply: c.deadline = in(config_.timeout); break;
            case State::Linger: c.deadline = now_ + kLingerSilence; break;
            case State::Done: c.deadline = Time::max(); break;
        }
        next_tick_ = std::min(next_tick_, c.deadline);
    }

    /// What happens to a connection whose time is up.
    void expire(Connection& c) {
        switch (c.state) {
            case State::ReadHead:
                if (c.in.empty()) { return set_state(c, State::Done); }
                return refuse(c, {408, "the head of the request took too long"});
            case State::ReadBody: return refuse(c, {408, "the body of the request stopped coming"});
            case State::Ready: return refuse(c, {503, "no runner was to be had"});
            case State::Reply:
                if (c.out.size() == 0) { return set_state(c, State::Reply); }
                log(Level::Info, "A client took nothing for too long: %s",
                    escape(c.request_line()).c_str());
                return client_gone(c);
            case State::Linger: return set_state(c, State::Done);
            case State::Run:
            case State::Done: return;
        }
    }

    // --- clients ------------------------------------------------------------

    /// accept4() where it exists: one system call instead of three.
    static Fd accept_socket(int listener, sockaddr_storage& peer) {
        socklen_t size = sizeof peer;
        const auto address = reinterpret_cast<sockaddr*>(&peer);
#ifdef SOCK_CLOEXEC
        return Fd(::accept4(listener, address, &size, SOCK_CLOEXEC | SOCK_NONBLOCK));
#else
        Fd fd(::accept(listener, address, &size));
        if (fd) { set_flags(fd.get(), true); }
        return fd;
#endif
    }

    /// Accepts up to `most` connections, or as long as the runner is idle, from each listener.
    void accept_clients(int most) {
        const bool idle = runner_.phase == Phase::Idle;
        for (const Listener& listener : listeners_) {
            for (int i = 0; i < most && (!idle || runner_.phase == Phase::Idle); ++i) {
                if (connected_ >= config_.worker_connections && !shed()) { return; }
                sockaddr_storage peer{};
                Fd fd = accept_socket(listener.fd.get(), peer);
                if (!fd && (errno == EINTR || errno == ECONNABORTED)) { continue; }
                if (!fd && !would_block()) {
                    log(Level::Error, "cannot accept: %s", std::strerror(errno));
                    shed();
                    accept_again_ = now_ + 100ms;  // not a spin, until something is freed
                    next_tick_ = std::min(next_tick_, accept_again_);
                }
                if (!fd) { break; }
                Connection* c = adopt(std::move(fd));
                if (c == nullptr) { return; }
                c->pass.accepted = now_;
                set_endpoints(*c, listener, peer);
                set_state(*c, State::ReadHead);
                read_client(*c);
                settle(*c);
            }
        }
    }

    static void set_endpoints(Connection& c, const Listener& listener,
                              const sockaddr_storage& peer) {
        std::tie(c.ends.peer, c.ends.peer_port) = address_text(peer);
        c.ends.server = listener.host;
        c.ends.server_port = listener.port;
        if (listener.wildcard) {
            std::tie(c.ends.server, c.ends.server_port) = socket_name(c.socket.get());
        }
    }

    /// The one door for sockets that select() will see; null for a descriptor beyond its reach.
    Connection* adopt(Fd fd) {
        const int number = fd.get();
        if (number >= FD_SETSIZE) { return nullptr; }
        connections_[number] = std::make_unique<Connection>(config_);
        connections_[number]->socket = std::move(fd);
        ++connected_;
        return connections_[number].get();
    }

    /// Makes room: ends a lingering connection, or the one that has been unfinished for longest.
    bool shed() {
        Connection* victim = nullptr;
        for (const auto& c : connections_) {
            if (!c || (c->state != State::Linger && c->state > State::ReadBody)) { continue; }
            const bool better = victim == nullptr ||
                                (c->state == State::Linger) > (victim->state == State::Linger) ||
                                ((c->state == State::Linger) == (victim->state == State::Linger) &&
                                 c->pass.accepted < victim->pass.accepted);
            if (better) { victim = c.get(); }
        }
        if (victim == nullptr) { return false; }
        if (victim->state != State::Linger && !victim->in.empty()) {
            refuse(*victim, {503, "too many connections"});
        }
        set_state(*victim, State::Done);
        settle(*victim);
        return true;
    }

    /// Reads what a client sent, and lets its state say what that means.
    void read_client(Connection& c) {
        const ssize_t n = retry([&] {
            return ::recv(c.socket.get(), buffer_, sizeof buffer_, 0);
        });
        if (n < 0) {
            if (!would_block()) { client_gone(c); }
            return;
        }
        c.pass.eof = n == 0;  // a half-close: the client still gets its answer
        const string_view data(buffer_, static_cast<size_t>(n));
        switch (c.state) {
            case State::ReadHead:
                c.in += data;
                return read_head(c);
            case State::ReadBody:
                c.in += data;
                return read_body(c);
            case State::Ready:
            case State::Run:
            case State::Reply: c.pass.more = c.pass.more || n > 0; return;
            case State::Linger: return linger(c);
            case State::Done: return;
        }
    }

    void read_head(Connection& c) {
        const Parse parsed = c.head.parse(c.in, c.request);
        if (parsed == Parse::NeedMore) {
            if (c.pass.eof && c.in.empty()) { return set_state(c, State::Done); }
            return c.pass.eof ? refuse(c, {400, "the head ends early"}) : void();
        }
        if (!c.request.path.empty()) {
            c.pass.minor = c.request.minor;
            c.pass.head_only = c.request.method == "HEAD";
        }
        if (parsed == Parse::Bad) { return refuse(c, c.head.error()); }
        const Request request = std::move(c.request);
        c.env = make_environ(request, c.ends);
        c.in.erase(0, c.head.size());
        c.pass.length = request.length;
        if (config_.limit_request_body > 0 && request.length > config_.limit_request_body) {
            return refuse(c, {413, "the body is too large"});
        }
        c.reader.start(request);
        set_state(c, State::ReadBody);
        if (request.expect_continue && c.in.empty() && (request.chunked || request.length > 0)) {
            c.out.append("HTTP/1.1 100 Continue\r\n\r\n", kReplyMemory);
            flush(c);
        }
        if (c.state == State::ReadBody) { read_body(c); }
    }

    void read_body(Connection& c) {
        string_view in = c.in, piece;
        Parse parsed;
        do {
            parsed = c.reader.next(in, piece);
            c.body.append(piece, kPiece);
        } while (parsed == Parse::NeedMore && !piece.empty());
        c.in.erase(0, c.in.size() - in.size());
        const int64_t limit = config_.limit_request_body;
        if (parsed == Parse::Bad) { return refuse(c, c.reader.error()); }
        if (limit > 0 && c.body.size() > limit) { return refuse(c, {413, "the body is too large"}); }
        if (c.body.failed()) { return refuse(c, {507, "no room on disk for the body"}); }
        if (parsed == Parse::Done) { return ready(c); }
        if (c.pass.eof) { return refuse(c, {400, "the body ends early"}); }
        set_state(c, State::ReadBody);
    }

    /// The request is complete: it runs at once, or waits, here for a moment or in the queue.
    void ready(Connection& c) {
        if (c.reader.chunked()) { c.pass.length = c.body.size(); }
        c.pass.more = !c.in.empty();
        c.in = string();
        c.pass.started = now_;
        set_state(c, State::Ready);
        if (runner_.phase == Phase::Idle) { return dispatch(c); }
        ready_.push_back(&c);
        next_pass_ = std::min(next_pass_, now_ + kPatience);
    }

    /// Answers in the server's own name, whatever became of the request.
    void refuse(Connection& c, const Error& error) {
        log(error.code < 500 ? Level::Warning : Level::Error, "%d to %s: %s: %s", error.code,
            c.ends.peer.c_str(), error.text.c_str(), escape(c.request_line()).c_str());
        forget_ready(c);
        c.pass.more = c.pass.more || c.state < State::Ready;
        string body;
        c.response = error_response(error.code, body);
        c.final_head = final_head(c.response, c.pass.minor, false);
        c.out.append(c.final_head, kReplyMemory);
        if (!c.pass.head_only) {
            c.out.append(body, kReplyMemory);
            c.body_bytes = c.response.length;
        }
        c.complete = true;
        set_state(c, State::Reply);
        flush(c);
    }

    void forget_ready(Connection& c) {
        if (c.state == State::Ready) {
            ready_.erase(std::remove(ready_.begin(), ready_.end(), &c), ready_.end());
        }
    }

    /// Sends what there is; ends the response once all of it has gone.
    void flush(Connection& c) {
        while (c.out.size() > 0) {
            const string_view data = c.out.front();
            const ssize_t n = retry([&] {
                return ::send(c.socket.get(), data.data(), data.size(), 0);
            });
            if (n < 0) { return would_block() ? void() : client_gone(c); }
            c.out.pop(static_cast<size_t>(n));
            if (c.state == State::Reply) { set_state(c, State::Reply); }
        }
        if (c.complete) { finish(c); }
    }

    /// All has been sent. A close with bytes unread would reset the connection, and could take the
    /// response with it: then half-close, and read on (RFC 9112 section 9.6).
    void finish(Connection& c) {
        write_access(c, c.response.status);
        if (c.broken && !c.chunked && c.left < 0) {
            const struct linger reset = {1, 0};  // only a reset shows that this response is cut
            ::setsockopt(c.socket.get(), SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
            return set_state(c, State::Done);
        }
        if (!c.pass.more || c.pass.eof) { return set_state(c, State::Done); }
        ::shutdown(c.socket.get(), SHUT_WR);
        c.pass.started = now_;
        set_state(c, State::Linger);
    }

    void linger(Connection& c) {
        const bool over = c.pass.eof || now_ >= c.pass.started + kLingerTotal;
        set_state(c, over ? State::Done : State::Linger);
    }

    /// A reset or a failed write: nobody is there to be answered.
    void client_gone(Connection& c) {
        const bool silent = c.state == State::ReadHead && c.in.empty();
        if (c.state != State::Linger && !silent) {
            write_access(c, c.response.status != 0 ? c.response.status : 499);
        }
        forget_ready(c);
        if (runner_.current == &c) {
            runner_.current = nullptr;
            runner_.tell_gone = true;
            feed_runner();
        }
        set_state(c, State::Done);
    }

    void write_access(const Connection& c, int status) const {
        if (!g_log.access_file) { return; }
        Access access{c.env, c.final_head, c.request_line(), c.ends.peer, status, c.body_bytes, {}};
        const Time start = c.pass.started != Time{} ? c.pass.started : c.pass.accepted;
        access.took = std::chrono::duration_cast<std::chrono::microseconds>(Clock::now() - start);
        (void)write_all(g_log.access_file.get(), access_line(config_.access_log_format, access));
    }

    // --- the ready queue ----------------------------------------------------

    /// Sends requests that have waited long enough to whichever worker has an idle runner first.
    /// A head too large for a datagram stays, and waits for the runner of this worker.
    void pass_on() {
        next_pass_ = Time::max();
        while (!ready_.empty()) {
            Connection& c = *ready_.front();
            next_pass_ = c.pass.started + kPatience;
            if (now_ < next_pass_) { return; }
            const string_view body = c.body.memory() > 0 ? c.body.front() : string_view();
            c.pass.stored = c.body.stored();
            c.pass.env_size = c.env.size();
            string message(reinterpret_cast<const char*>(&c.pass), sizeof c.pass);
            (message += c.env) += body;
            const int fds[] = {c.socket.get(), c.body.file().get()};
            if (!send_message(queue_.in.get(), message, fds, c.pass.stored > 0 ? 2 : 1)) {
                next_pass_ = now_ + 10ms;
                return;
            }
            ready_.pop_front();
            set_state(c, State::Done);
            settle(c);
            next_pass_ = Time::max();
        }
    }

    /// The request that has waited longest in the queue, null if there is none.
    Connection* take_from_queue() {
        while (true) {
            std::vector<Fd> fds;
            const ssize_t n = receive_message(queue_.out.get(), buffer_, sizeof buffer_, fds);
            if (n < static_cast<ssize_t>(sizeof(Passport)) || fds.empty()) { return nullptr; }
            Connection* c = adopt(std::move(fds[0]));
            if (c == nullptr) { return nullptr; }
            std::memcpy(&c->pass, buffer_, sizeof c->pass);
            const string_view data(buffer_ + sizeof c->pass, static_cast<size_t>(n) - sizeof c->pass);
            c->env = data.substr(0, c->pass.env_size);
            c->body.append(data.substr(c->env.size()), data.size());
            if (fds.size() > 1) { c->body.adopt_file(raise_fd(std::move(fds[1])), c->pass.stored); }
            c->ends.peer = lookup(c->env, "REMOTE_ADDR");
            set_state(*c, State::Ready);
            if (now_ >= c->deadline) { expire(*c); }
            if (c->state == State::Ready && !c->pass.eof) { read_client(*c); }  // perhaps it has gone
            if (c->state == State::Ready) { return c; }
            settle(*c);
        }
    }

    bool queue_is_empty() const {
        char byte;
        return ::recv(queue_.out.get(), &byte, 1, MSG_PEEK | MSG_DONTWAIT) < 0;
    }

    /// Answers what has waited in the queue too long when no runner came to take it.
    void expire_queue() {
        Passport pass;
        while (config_.timeout > 0s &&
               ::recv(queue_.out.get(), &pass, sizeof pass, MSG_PEEK | MSG_DONTWAIT) > 0 &&
               now_ >= pass.started + config_.timeout) {
            if (Connection* c = take_from_queue()) { ready_.push_back(c); }
        }
    }

    // --- the runner ---------------------------------------------------------

    bool stalled() const { return runner_.current != nullptr && runner_.current->out.full(); }

    void dispatch(Connection& c) {
        set_state(c, State::Run);
        string header("CONTENT_LENGTH", 15);
        header += c.pass.length < 0 ? "" : to_string(c.pass.length);
        (header += '\0') += c.env;
        runner_.outgoing = to_string(header.size()) + ":" + header + ",";
        runner_.body = std::move(c.body);
        if (runner_.body.memory() > 0) {
            const string_view part = runner_.body.front();
            runner_.outgoing += part;
            runner_.body.pop(part.size());
        }
        runner_.current = &c;
        runner_.phase = Phase::Busy;
        runner_.answered = runner_.tell_gone = false;
        runner_.request = c.request_line();
        runner_.since = now_;
        extend_deadline();
        feed_runner();
    }

    /// Some sign of life: the application gets `timeout` seconds from now.
    void extend_deadline() {
        runner_.deadline = config_.timeout > 0s ? now_ + config_.timeout : Time::max();
        next_tick_ = std::min(next_tick_, runner_.deadline);
    }

    void feed_runner() {
        while (runner_.to) {
            const bool sent = runner_.outgoing.empty() && runner_.body.size() == 0;
            if (sent && !std::exchange(runner_.tell_gone, false)) { return become_idle(); }
            if (sent) { runner_.outgoing = "0:,"; }
            const string_view data =
                runner_.outgoing.empty() ? runner_.body.front() : runner_.outgoing;
            const ssize_t n =
                retry([&] { return ::write(runner_.to.get(), data.data(), data.size()); });
            if (n < 0) { return would_block() ? void() : lose_runner(); }
            if (runner_.outgoing.empty()) {
                runner_.body.pop(static_cast<size_t>(n));
            } else {
                runner_.outgoing.erase(0, static_cast<size_t>(n));
            }
        }
    }

    /// Reads once what the runner says; false where there is nothing more to read.
    bool read_runner() {
        using Event = NetstringReader::Event;
        const ssize_t n =
            retry([&] { return ::read(runner_.from.get(), buffer_, kPiece); });
        if (n <= 0) {
            if (n == 0 || !would_block()) { lose_runner(); }
            return false;
        }
        if (runner_.phase == Phase::Busy) { extend_deadline(); }
        string_view in(buffer_, static_cast<size_t>(n)), piece;
        while (true) {
            const Event event = runner_.reader.next(in, piece);
            const bool last = event == Event::End || event == Event::Failed;
            if (event == Event::NeedMore) { break; }
            if (event == Event::Bad || (last && !in.empty()) ||
                (runner_.phase != Phase::Busy && event != Event::End)) {
                log(Level::Error, "Runner (pid:%d) broke the protocol", runner_.pid);
                signal_runner(SIGKILL);
                lose_runner();
                return false;
            }
            if (last) { end_reply(event == Event::End); }
            if (event == Event::Piece && runner_.current != nullptr) {
                take_reply(*runner_.current, piece);
            }
        }
        if (Connection* c = runner_.current; c != nullptr && c->state == State::Reply) {
            flush(*c);
            settle(*c);
        }
        return true;
    }

    /// A piece of the response: the head of the application is checked before anything is sent.
    void take_reply(Connection& c, string_view piece) {
        if (c.response.status == 0) {
            if (!c.app_head.empty()) { piece = c.app_head += piece; }
            const size_t end = piece.find("\n\n");
            if (end == string::npos && piece.size() <= kMaxHead) {
                if (c.app_head.empty()) { c.app_head = piece; }
                return;
            }
            Error error{500, "a head without end"};
            if (end != string::npos) { error = parse_response(piece.substr(0, end + 1), c.response); }
            if (error) {
                runner_.current = nullptr;
                runner_.tell_gone = true;
                refuse(c, {500, "the application sent " + error.text});
                settle(c);
                return feed_runner();
            }
            if (!c.response.dropped.empty()) {
                log(Level::Warning, "Dropped from the application's response: %s: %s",
                    c.response.dropped.c_str(), escape(c.request_line()).c_str());
            }
            const int status = c.response.status;
            c.pass.head_only = c.pass.head_only || status == 204 || status == 304;
            c.left = c.pass.head_only ? -1 : c.response.length;
            c.chunked = !c.pass.head_only && c.left < 0 && c.pass.minor > 0;
            c.final_head = final_head(c.response, c.pass.minor, c.chunked);
            c.out.append(c.final_head, kReplyMemory);
            set_state(c, State::Reply);
            piece.remove_prefix(end + 2);
        }
        reply_body(c, piece);
    }

    void reply_body(Connection& c, string_view piece) {
        if (c.pass.head_only) { return; }
        if (c.left >= 0) {
            if (static_cast<int64_t>(piece.size()) > c.left && !std::exchange(c.too_long, true)) {
                log(Level::Error, "The response is longer than its Content-Length: %s",
                    escape(c.request_line()).c_str());
            }
            piece = piece.substr(0, std::min(piece.size(), static_cast<size_t>(c.left)));
            c.left -= static_cast<int64_t>(piece.size());
        }
        if (piece.empty()) { return; }
        c.body_bytes += static_cast<int64_t>(piece.size());
        const size_t limit = reply_memory_ < kWorkerMemory ? kReplyMemory : 0;
        if (c.chunked) { c.out.append(to_hex(piece.size()) + "\r\n", limit); }
        c.out.append(piece, limit);
        if (c.chunked) { c.out.append("\r\n", limit); }
    }

    /// The runner has said all it has to say about this request, or that it is ready.
    void end_reply(bool good) {
        if (runner_.phase == Phase::Booting) {
            runner_.phase = Phase::Idle;
            if (!std::exchange(booted_, true)) {
                notify();
                (void)!::write(arbiter_.get(), "", 1);
            }
            return next_request();
        }
        runner_.answered = true;
        runner_.tell_gone = false;
        if (good) { failures_ = 0; }
        if (Connection* c = std::exchange(runner_.current, nullptr)) {
            if (!good) {
                log(Level::Error, "Error handling request: %s", escape(c->request_line()).c_str());
            }
            if (good && c->left > 0) {
                log(Level::Error, "The response is shorter than its Content-Length: %s",
                    escape(c->request_line()).c_str());
            }
            if (good && c->chunked) { c->out.append("0\r\n\r\n", kReplyMemory); }
            end_response(*c, good && c->left <= 0, {500, "the application failed"});
        }
        become_idle();
    }

    /// No more will come of this response; `error` is the answer if nothing has come.
    void end_response(Connection& c, bool good, const Error& error) {
        if (c.response.status == 0) {
            refuse(c, error);
        } else {
            c.broken = !good;
            c.complete = true;
            flush(c);
        }
        settle(c);
    }

    /// The slot is free once the response has ended and the request has gone out entirely.
    void become_idle() {
        if (runner_.phase == Phase::Busy && runner_.answered && runner_.outgoing.empty() &&
            runner_.body.size() == 0) {
            runner_.phase = Phase::Idle;
            runner_.deadline = Time::max();
            next_request();
        }
    }

    /// What came late waits here, what has waited for longer in the queue: that goes first.
    void next_request() {
        if (ready_.empty()) { return; }
        Connection* c = take_from_queue();
        if (c == nullptr) {
            c = ready_.front();
            ready_.pop_front();
        }
        dispatch(*c);
    }

    /// A pipe broke: waitpid() will tell why, soon, or the runner has no business any more.
    void lose_runner() {
        runner_.to.reset();
        runner_.from.reset();
        runner_.deadline = Time::max();
        runner_.phase = Phase::Dying;
        kill_runner_after(1s);
    }

    void kill_runner_after(Clock::duration delay) {
        runner_.kill_at = std::min(runner_.kill_at, now_ + delay);
        next_tick_ = std::min(next_tick_, runner_.kill_at);
    }

    /// SIGKILL is for whatever the application has forked, too.
    void signal_runner(int number) {
        runner_.signal = number;
        runner_.kill_at = Time::max();
        ::kill(number == SIGKILL ? -runner_.pid : runner_.pid, number);
    }

    /// Closes its pipe: the runner leaves as any Python program does, or is killed.
    void dismiss_runner(Clock::duration grace) {
        runner_.to.reset();
        if (runner_.phase != Phase::Busy) { runner_.phase = Phase::Dying; }
        kill_runner_after(grace);
    }

    /// No frame for `timeout` seconds. faulthandler prints the stack at SIGABRT.
    void hung_app() {
        if (stalled()) { return extend_deadline(); }
        log(Level::Critical, "WORKER TIMEOUT (pid:%d): no answer for %lld s: %s", runner_.pid,
            static_cast<long long>(config_.timeout.count()), escape(runner_.request).c_str());
        signal_runner(SIGABRT);
        lose_runner();
        runner_.kill_at = now_ + kKillDelay;
        if (Connection* c = std::exchange(runner_.current, nullptr)) {
            end_response(*c, false, {504, "the application did not answer in time"});
        }
    }

    /// The runner has ended: its request is answered, and another runner started.
    void reap_runner() {
        int status = 0;
        if (runner_.pid < 0 || ::waitpid(runner_.pid, &status, WNOHANG) != runner_.pid) { return; }
        while (runner_.from && read_runner()) {}  // what it still said counts
        const bool wanted = !has_work() && (runner_.signal != 0 || status == 0);
        if (WIFSIGNALED(status)) { ::kill(-runner_.pid, SIGKILL); }
        if (!wanted) {
            const bool busy = runner_.current != nullptr;
            log(Level::Error, "Runner (pid:%d) %s%s%s%s", runner_.pid, exit_text(status).c_str(),
                runner_.signal != 0 ? ", sent by this server" : "", busy ? ": " : "",
                busy ? escape(runner_.request).c_str() : "");
        }
        Connection* c = std::exchange(runner_.current, nullptr);
        runner_ = Runner{};
        if (c != nullptr) { end_response(*c, false, {502, "the runner died"}); }
        if (!booted_ && !stopping_) {
            const int code = WIFEXITED(status) ? WEXITSTATUS(status) : 0;
            status_ = code == kWorkerBootError || code >= 126 ? kWorkerBootError : kAppLoadError;
            return;
        }
        if (!has_work()) { return; }
        const seconds delay(failures_ == 0 ? 0 : std::min(30, 1 << std::min(failures_ - 1, 5)));
        if (failures_++ > 0) {
            log(Level::Warning, "The next runner starts in %d s", static_cast<int>(delay.count()));
        }
        restart_at_ = now_ + delay;
        next_tick_ = std::min(next_tick_, restart_at_);
    }

    Error restart_runner() {
        restart_at_ = now_ + 1s;  // should it fail
        if (Error error = start_runner(config_, runner_, files_)) { return error; }
        restart_at_ = Time::max();
        max_fd_ = std::max({max_fd_, runner_.to.get(), runner_.from.get()});
        return {};
    }

    const Config& config_;
    std::vector<Listener>& listeners_;
    ReadyQueue& queue_;
    WorkerTmp& tmp_;
    Fd arbiter_;  // a byte written here wakes the arbiter
    pid_t arbiter_pid_;
    rlim_t files_;
    Runner runner_;
    std::unique_ptr<Connection> connections_[FD_SETSIZE];  // by descriptor
    std::deque<Connection*> ready_;                        // complete, waiting here for a runner
    int connected_ = 0, failures_ = 0, status_ = 0, max_fd_ = 0;
    bool booted_ = false, stopping_ = false, quick_ = false, accepting_ = false;
    size_t reply_memory_ = 0;
    fd_set reads_, writes_;  // what select() watches for the connections
    Time now_ = Clock::now(), next_tick_ = now_, next_notify_ = now_, accept_again_ = now_;
    Time next_pass_ = Time::max(), restart_at_ = Time::max();
    char buffer_[4 * kPiece];  // a whole datagram of the ready queue fits
};

// ============================================================================
//  10. Arbiter: the master process
//
//  It never reads a request. Its loop sleeps on the self-pipe, handles one signal at a time,
//  and then makes the workers what they should be; nothing in it waits for a worker.
// ============================================================================
struct WorkerInfo {
    pid_t pid;
    int generation;           // of the reload it belongs to
    WorkerTmp tmp;
    Time spawned, last_change;
    struct timespec last_update {};
    bool booted = false, stopping = false, aborted = false;
};

class Arbiter {
public:
    Arbiter(const Config& config, std::vector<Listener> listeners, rlim_t files)
        : config_(config), listeners_(std::move(listeners)), files_(files),
          num_workers_(config.workers) {}

    int run() {
        if (Error error = start()) {
            log(Level::Critical, "%s", error.text.c_str());
            return error.code;
        }
        while (!stopping_ || !workers_.empty()) {
            manage_workers();
            fd_set reads;
            FD_ZERO(&reads);
            FD_SET(g_self_pipe.first.get(), &reads);
            wait_ready(g_self_pipe.first.get(), &reads, nullptr, next_wake());
            update_clock();
            for (int number; (number = next_signal()) >= 0;) { handle_signal(number); }
            reap_workers();
            murder_workers();
        }
        unlink_sockets();
        log(Level::Info, "Shutting down: Master");
        if (!reason_.empty()) { log(Level::Info, "Reason: %s", reason_.c_str()); }
        return status_;
    }

private:
    Error start() {
        log(Level::Info, "Starting server %s", kVersion);
        string text;
        for (const Listener& each : listeners_) { text += (text.empty() ? "" : ",") + each.text; }
        log(Level::Info, "Listening at: %s (%d)", text.c_str(), ::getpid());
        log(Level::Info, "Using worker: %s", config_.worker_class.c_str());
        int fds[2];
        if (::socketpair(AF_UNIX, SOCK_DGRAM, 0, fds) < 0) {
            return os_error("cannot make the ready queue");
        }
        queue_ = {Fd(fds[0]), Fd(fds[1])};
        for (const int fd : fds) { set_flags(fd, true); }
        set_signal(SIGPIPE, SIG_IGN);
        return open_self_pipe({SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTTIN, SIGTTOU, SIGCHLD});
    }

    Time next_wake() const {
        const auto soon = stopping_ || aborting_ ? 100ms : 1000ms;
        return std::min(now_ + soon, std::max(spawn_again_, now_ + 10ms));
    }

    /// After a stop or a suspend of this process the workers' silence proves nothing.
    void update_clock() {
        const Time before = std::exchange(now_, Clock::now());
        if (now_ > before + 3s) {
            for (WorkerInfo& worker : workers_) { worker.last_change = now_; }
        }
    }

    void handle_signal(int number) {
        switch (number) {
            case SIGHUP: return handle_hup();
            case SIGTERM: return handle_stop("term", SIGTERM);
            case SIGINT: return handle_stop("int", SIGINT);
            case SIGQUIT: return handle_stop("quit", SIGQUIT);
            case SIGTTIN: return handle_ttin();
            case SIGTTOU: return handle_ttou();
            default: return;
        }
    }

    /// TERM: workers finish what they have. INT and QUIT, also later: at once.
    void handle_stop(const char* name, int number) {
        log(Level::Info, "Handling signal: %s", name);
        const bool quick = number != SIGTERM;
        if (stopping_ && (!quick || quick_)) { return; }
        halt(quick);
    }

    void halt(bool quick) {
        stopping_ = true;
        quick_ = quick;
        for (Listener& listener : listeners_) { listener.fd.reset(); }
        stop_by_ = now_ + (quick ? Clock::duration(700ms) : Clock::duration(config_.graceful_timeout));
        for (WorkerInfo& worker : workers_) { stop_worker(worker, quick ? SIGQUIT : SIGTERM); }
    }

    void handle_ttin() {
        log(Level::Info, "Handling signal: ttin");
        ++num_workers_;
    }

    void handle_ttou() {
        log(Level::Info, "Handling signal: ttou");
        num_workers_ = std::max(1, num_workers_ - 1);
    }

    /// Reload, first step: one worker of a new generation, the canary. When it is ready the rest
    /// follow, and then the old ones go (promote, manage_workers); if it fails they stay.
    void handle_hup() {
        log(Level::Info, "Handling signal: hup");
        if (stopping_) { return; }
        log(Level::Info, "Hang up: Master");
        if (Error error = open_logs(config_)) { log(Level::Error, "%s", error.text.c_str()); }
        for (WorkerInfo& worker : workers_) {
            if (worker.pid == canary_) { stop_worker(worker, SIGTERM); }
        }
        canary_ = spawn_worker(++newest_);
    }

    /// What a look at the heartbeat files tells: who lives, who is ready.
    void read_heartbeats() {
        for (WorkerInfo& worker : workers_) {
            bool booted = false;
            const struct timespec update = worker.tmp.last_update(booted);
            if (update.tv_sec != worker.last_update.tv_sec ||
                update.tv_nsec != worker.last_update.tv_nsec) {
                worker.last_update = update;
                worker.last_change = now_;
            }
            if (!booted || worker.booted) { continue; }
            worker.booted = ever_booted_ = true;
            if (worker.pid == canary_) {
                generation_ = worker.generation;
                canary_ = -1;
            }
        }
    }

    /// Ends workers that have not beaten for `timeout`: SIGABRT, then SIGKILL.
    void murder_workers() {
        read_heartbeats();
        aborting_ = false;
        if (stopping_ && now_ >= stop_by_) {
            for (const WorkerInfo& worker : workers_) { ::kill(worker.pid, SIGKILL); }
        }
        for (WorkerInfo& worker : workers_) {
            if (config_.timeout == 0s || now_ < worker.last_change + config_.timeout) { continue; }
            if (!std::exchange(worker.aborted, true)) {
                log(Level::Critical, "WORKER TIMEOUT (pid:%d)", worker.pid);
                ::kill(worker.pid, SIGABRT);
                worker.last_change = now_ - config_.timeout + kKillDelay;
            } else {
                ::kill(worker.pid, SIGKILL);
            }
            aborting_ = true;
        }
    }

    void reap_workers() {
        int status = 0;
        for (pid_t pid; (pid = ::waitpid(-1, &status, WNOHANG)) > 0;) {
            const auto found = std::find_if(workers_.begin(), workers_.end(),
                                            [pid](const WorkerInfo& w) { return w.pid == pid; });
            if (found == workers_.end()) { continue; }
            read_heartbeats();
            const WorkerInfo worker = std::move(*found);
            workers_.erase(found);
            const bool clean = WIFEXITED(status) && WEXITSTATUS(status) == 0;
            if (!clean) {
                log(Level::Error, "Worker (pid:%d) %s", pid, exit_text(status).c_str());
            }
            if (!stopping_) { worker_lost(worker, clean ? 0 : status); }
        }
    }

    /// A worker has gone that nobody sent away: halt if none could ever boot, else back off.
    void worker_lost(const WorkerInfo& worker, int status) {
        const int code = WIFEXITED(status) ? WEXITSTATUS(status) : 0;
        if (!ever_booted_ && (code == kWorkerBootError || code == kAppLoadError)) {
            status_ = code;
            reason_ = code == kAppLoadError ? "App failed to load." : "Worker failed to boot.";
            return halt(true);
        }
        if (worker.pid == canary_) {
            canary_ = -1;
            log(Level::Error, "Reload failed; the old workers go on");
            return;
        }
        if (worker.stopping) { return; }
        failures_ = worker.booted && now_ > worker.spawned + 5s ? 0 : failures_ + 1;
        const seconds delay(failures_ < 2 ? 0 : std::min(30, 1 << std::min(failures_ - 2, 5)));
        spawn_again_ = now_ + delay;
        if (delay > 0s) {
            log(Level::Warning, "Workers fail; the next one starts in %d s",
                static_cast<int>(delay.count()));
        }
    }

    /// Makes the workers of the serving generation as many as wanted, and ends older ones once
    /// all of these are ready.
    void manage_workers() {
        if (stopping_) { return; }
        int alive = 0, ready = 0;
        for (const WorkerInfo& worker : workers_) {
            if (worker.generation != generation_ || worker.stopping) { continue; }
            ++alive;
            ready += worker.booted ? 1 : 0;
        }
        for (; alive < num_workers_ && now_ >= spawn_again_; ++alive) {
            if (spawn_worker(generation_) < 0) { return; }
        }
        for (WorkerInfo& worker : workers_) {  // the oldest first
            const bool old = worker.generation < generation_ && ready >= num_workers_;
            const bool surplus = worker.generation == generation_ && alive > num_workers_;
            if (worker.stopping || !(old || surplus)) { continue; }
            stop_worker(worker, SIGTERM);
            alive -= surplus ? 1 : 0;
        }
    }

    void stop_worker(WorkerInfo& worker, int number) {
        worker.stopping = true;
        ::kill(worker.pid, number);
    }

    /// Forks one worker; its pid, or -1. The child leaves by _exit: nothing of the arbiter's runs.
    pid_t spawn_worker(int generation) {
        Result<Fd> file = make_temp_file(heartbeat_dir());
        if (file.error) { log(Level::Error, "%s", file.error.text.c_str()); }
        WorkerInfo info{-1, generation, WorkerTmp(std::move(file.value)), now_, now_};
        const sigset_t mask = block_signals(true);
        const pid_t pid = file.error ? -1 : ::fork();
        if (pid == 0) {
            workers_.clear();
            const auto worker = std::make_unique<Worker>(config_, listeners_, queue_, info.tmp,
                                                         std::move(g_self_pipe.second), files_);
            ::_exit(worker->run());
        }
        ::sigprocmask(SIG_SETMASK, &mask, nullptr);
        if (pid < 0) {
            log(Level::Error, "cannot start a worker: %s", std::strerror(errno));
            spawn_again_ = now_ + 1s;
            return -1;
        }
        info.pid = pid;
        workers_.push_back(std::move(info));
        return pid;
    }

    string heartbeat_dir() const {
        if (!config_.worker_tmp_dir.empty()) { return config_.worker_tmp_dir; }
        return ::access("/dev/shm", W_OK | X_OK) == 0 ? "/dev/shm" : temp_dir();
    }

    void unlink_sockets() const {
        for (const Listener& each : listeners_) {
            if (!each.path.empty() && each.owner == ::getpid()) { ::unlink(each.path.c_str()); }
        }
    }

    const Config& config_;
    std::vector<Listener> listeners_;
    rlim_t files_;
    ReadyQueue queue_;
    std::vector<WorkerInfo> workers_;
    int num_workers_;
    int generation_ = 0, newest_ = 0;  // that serves; that was last tried
    pid_t canary_ = -1;
    int failures_ = 0, status_ = 0;
    bool stopping_ = false, quick_ = false, ever_booted_ = false, aborting_ = false;
    Time now_ = Clock::now(), spawn_again_ = now_, stop_by_ = Time::max();
    string reason_;
};

// ============================================================================
//  12. main
// ============================================================================
int fail(const Error& error) {
    std::fprintf(stderr, "Error: %s\n", error.text.c_str());
    return error.code;
}

/// Puts the settings into force: directory, environment, limits, logs. `files` gets the soft limit
/// on descriptors as it was, for the application.
Error apply(Config& config, rlim_t& files) {
    if (!config.chdir.empty() && ::chdir(config.chdir.c_str()) < 0) {
        return os_error("cannot change to " + config.chdir);
    }
    for (const string& pair : config.raw_env) {
        const size_t equals = pair.find('=');
        ::setenv(pair.substr(0, equals).c_str(), pair.substr(equals + 1).c_str(), 1);
    }
    struct rlimit limit {};
    ::getrlimit(RLIMIT_NOFILE, &limit);
    files = limit.rlim_cur;
    limit.rlim_cur = std::min<rlim_t>(limit.rlim_max, 4 * FD_SETSIZE);
    ::setrlimit(RLIMIT_NOFILE, &limit);
    const int reserved = 20 + static_cast<int>(config.bind.size());
    const int most = static_cast<int>(std::min<rlim_t>(limit.rlim_cur, FD_SETSIZE)) - reserved;
    if (Error error = open_logs(config)) { return error; }
    if (config.worker_connections > most) {
        log(Level::Warning, "--worker-connections lowered from %d to %d: no more descriptors fit",
            config.worker_connections, most);
        config.worker_connections = most;
    }
    return {};
}

/// --check-config: does the application load?
int check_app(const Config& config, rlim_t files) {
    Runner runner;
    if (Error error = start_runner(config, runner, files)) { return fail(error); }
    set_flags(runner.from.get(), false);
    char byte = 0;
    ::fcntl(runner.from.get(), F_SETFL, 0);
    const bool loaded = retry([&] { return ::read(runner.from.get(), &byte, 1); }) == 1;
    runner.to.reset();
    int status = 0;
    retry([&] { return ::waitpid(runner.pid, &status, 0); });
    if (loaded) { return 0; }
    return WIFEXITED(status) && WEXITSTATUS(status) == kWorkerBootError ? kWorkerBootError
                                                                        : kAppLoadError;
}

}  // namespace

int main(int argc, char** argv) {
    while (true) {  // a missing standard descriptor must not become a socket's number
        Fd null(::open("/dev/null", O_RDWR));
        if (null.get() > STDERR_FILENO) { break; }
        (void)null.release();
    }
    Config config;
    if (Error error = read_environment(config)) { return fail(error); }
    if (Error error = parse_command_line({argv + 1, argv + argc}, config)) { return fail(error); }
    if (config.help) { return print_help(), 0; }
    if (config.version) { return std::printf("server %s\n", kVersion), 0; }
    if (config.print_config) { return print_config(config), 0; }
    std::vector<Address> addresses;
    for (const string& text : config.bind) {
        Result<Address> address = parse_address(text);
        if (address.error) { return fail(address.error); }
        addresses.push_back(std::move(address.value));
    }
    rlim_t files = 0;
    if (Error error = apply(config, files)) { return fail(error); }
    if (config.check_config) { return check_app(config, files); }
    std::vector<Listener> listeners;
    for (const Address& address : addresses) {
        Result<Listener> listener = bind_address(address, config.backlog);
        if (listener.error) { return fail(listener.error); }
        listeners.push_back(std::move(listener.value));
    }
    return Arbiter(config, std::move(listeners), files).run();
}
