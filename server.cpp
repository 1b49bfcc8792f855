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
//   accept_clients → read_client → read_head → read_body → ready ──┬→ dispatch → feed_runner
//                          ready queue: pass_on → take_from_queue ─┘        (runner: Slot.serve)
//   finish ← flush ← end_reply ← reply_body ← take_reply ← read_runner ←──────────┘
//
// A client costs the application nothing but one complete request: the worker reads it to the
// end without blocking, waits for an idle runner (its own, or another worker's by the ready
// queue), and takes the response at the application's speed, whatever the client's.
//
//   Signal      arbiter                                      worker
//   TERM        graceful stop: USR2 to all workers           serve what was accepted, then leave
//   USR2        ignored                                      the same, and empty the ready queue
//   INT, QUIT   stop within a second                         leave at once
//   HUP         reload: new workers, then TERM to the old    ignored
//   TTIN, TTOU  one worker more, one worker less             ignored
//   CHLD        reap_workers                                 reap_runner
//
// Contents: grep '^//  [0-9]' server.cpp
#include <arpa/inet.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
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
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <deque>
#include <memory>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

extern char** environ;

namespace {

// ============================================================================
//  1. Small tools
//
//  Errors are values: a forked child must not unwind through its parent's frames, and in a
//  select loop most failures are one connection's everyday result. Deadlines come from the
//  steady clock alone; the wall clock is for people.
// ============================================================================
using std::string;
using std::string_view;
using std::to_string;
using std::chrono::seconds;
using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;
using Time = Clock::time_point;

constexpr const char* kVersion = "0.1.0";
constexpr int kWorkerBootError = 3, kAppLoadError = 4;  // exit statuses with gunicorn's meanings
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
    Fd& operator=(Fd&& other) noexcept { return reset(other.release()), *this; }
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

ssize_t read_some(const Fd& fd, char* to, size_t room) {
    return retry([&] { return ::read(fd.get(), to, room); });
}

ssize_t write_some(const Fd& fd, string_view data) {
    return retry([&] { return ::write(fd.get(), data.data(), data.size()); });
}

/// Writes everything to a blocking descriptor; false, with errno, where that fails.
bool write_all(const Fd& fd, string_view data) {
    while (!data.empty()) {
        const ssize_t n = write_some(fd, data);
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
    for (const int fd : fds) { set_flags(fd, false); }
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
    text.remove_prefix(std::min(text.find_first_not_of(" \t"), text.size()));
    return text.substr(0, text.find_last_not_of(" \t") + 1);
}

/// Cuts off and returns what stands before the first `separator`, or everything.
string_view cut(string_view& text, char separator) {
    const string_view part = text.substr(0, text.find(separator));
    text.remove_prefix(std::min(part.size() + 1, text.size()));
    return part;
}

/// Reads digits and nothing else; false also where the number does not fit 63 bits.
bool parse_number(string_view text, int64_t& number, int base = 10) {
    const char* end = text.data() + text.size();
    const auto [stop, problem] = std::from_chars(text.data(), end, number, base);
    return problem == std::errc() && stop == end && text.front() != '-';
}

/// Makes bytes of a client harmless in a log: controls, quotes, backslashes and all but ASCII.
string escape(string_view text) {
    string out;
    for (const char c : text) {
        char code[5] = {'\\', c};
        const auto byte = static_cast<unsigned char>(c);
        const bool plain = byte >= ' ' && byte < 0x7f;
        if (!plain) { std::snprintf(code, sizeof code, "\\x%02x", byte); }
        out += plain && c != '"' && c != '\\' ? code + 1 : code;
    }
    return out;
}

/// Bytes in the order they came: the first in memory, the rest in an unlinked temporary file.
class Spool {
public:
    /// Adds bytes, in memory up to `limit` of them there. Where the disk refuses they stay in
    /// memory all the same, and failed() says so.
    void append(string_view data, size_t limit) {
        if (stored() == 0 && tail_.empty() && memory() + data.size() <= limit) {
            if (offset_ > kPiece) { memory_.erase(0, std::exchange(offset_, 0)); }
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
    bool failed() const { return !tail_.empty(); }
    bool full() const { return failed() || file_end_ >= int64_t{1} << 30; }
    size_t memory() const { return memory_.size() - offset_ + tail_.size(); }
    int64_t stored() const { return file_end_ - file_begin_; }
    int64_t size() const { return stored() + static_cast<int64_t>(memory()); }
    const Fd& file() const { return file_; }
    void adopt_file(Fd file, int64_t bytes) { file_ = std::move(file), file_end_ = bytes; }

private:
    bool store(string_view data) {  // all of it or, on a full disk, nothing
        if (!file_) { file_ = std::move(make_temp_file(temp_dir()).value); }
        const bool there = ::lseek(file_.get(), file_end_, SEEK_SET) >= 0;
        if (!there || !write_all(file_, data)) { return false; }
        file_end_ += static_cast<int64_t>(data.size());
        return true;
    }

    void refill() {
        memory_.clear();
        offset_ = 0;
        if (stored() == 0) {
            file_begin_ = file_end_ = 0;
            return memory_.swap(tail_);
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

/// Blocks all signals, or none.
void block_signals(bool block) {
    sigset_t set;
    block ? sigfillset(&set) : sigemptyset(&set);
    ::sigprocmask(SIG_SETMASK, &set, nullptr);
}

/// A new self-pipe for this process, and the handler for the given signals.
Error open_self_pipe(std::initializer_list<int> signals) {
    Result<Pair> made = make_pipe();
    if (made.error) { return made.error; }
    g_self_pipe = std::move(made.value);
    for (const Fd* end : {&g_self_pipe.first, &g_self_pipe.second}) { set_flags(end->get(), true); }
    for (const int number : signals) { set_signal(number, on_signal); }
    return {};
}

/// The next signal that has arrived, 0 for a mere wake-up, -1 if there is none.
int next_signal() {
    char byte;
    return ::read(g_self_pipe.first.get(), &byte, 1) == 1 ? byte : -1;
}

/// select(), until `until` at the latest. Where nothing is ready the sets come back empty.
void wait_ready(int max_fd, fd_set& reads, fd_set& writes, Time until) {
    const auto left = std::chrono::ceil<std::chrono::microseconds>(until - Clock::now()).count();
    const auto us = std::clamp<decltype(left)>(left, 0, 3600'000'000);
    struct timeval timeout {};
    timeout.tv_sec = static_cast<time_t>(us / 1000000);
    timeout.tv_usec = static_cast<suseconds_t>(us % 1000000);
    if (::select(max_fd + 1, &reads, &writes, nullptr, &timeout) < 0) {
        FD_ZERO(&reads);
        FD_ZERO(&writes);
    }
}

// ============================================================================
//  2. Settings
//
//  A default is written once, in Config; an option once, in kOptions. Parsing, --help and
//  --print-config all walk that table. Names and meanings are gunicorn's.
// ============================================================================
using Strings = std::vector<string>;

struct Config {
    string app = "app_example:app", worker_class = "sync";
    int workers = 2, backlog = 2048, worker_connections = 1000;
    int limit_request_line = 4094, limit_request_fields = 100, limit_request_field_size = 8190;
    int64_t limit_request_body = int64_t{1} << 30;
    seconds timeout{30}, graceful_timeout{30}, header_timeout{10};
    string chdir, worker_tmp_dir, accesslog, errorlog = "-", loglevel = "info";
    string access_log_format =
        "%(h)s %(l)s %(u)s %(t)s \"%(r)s\" %(s)s %(b)s \"%(f)s\" \"%(a)s\"";
    Strings bind, pythonpath, raw_env;
    string python = "python3", runner;
    bool check_config = false, print_config = false, version = false, help = false;
};

string join(const Strings& parts) {
    string out;
    for (const string& part : parts) { out += (out.empty() ? "" : ",") + part; }
    return out;
}

template <auto Member>
string get(const Config& config) {
    using T = std::decay_t<decltype(config.*Member)>;
    if constexpr (std::is_same_v<T, string>) { return config.*Member; }
    else if constexpr (std::is_same_v<T, Strings>) { return join(config.*Member); }
    else if constexpr (std::is_same_v<T, seconds>) { return to_string((config.*Member).count()); }
    else { return to_string(config.*Member); }
}

/// Sets a string, adds to a list, raises a flag, or reads a number from Low to High.
template <auto Member, int64_t Low = 0, int64_t High = INT_MAX>
Error set(Config& config, string_view text) {
    using T = std::decay_t<decltype(config.*Member)>;
    if constexpr (std::is_same_v<T, string>) { config.*Member = string(text); }
    else if constexpr (std::is_same_v<T, Strings>) { (config.*Member).emplace_back(text); }
    else if constexpr (std::is_same_v<T, bool>) { config.*Member = true; }
    else {
        const string_view digits = text.substr(text.substr(0, 1) == "-" ? 1 : 0);
        if (digits.empty() || !std::all_of(digits.begin(), digits.end(), is_digit)) {
            return {2, "'" + string(text) + "' is not a whole number"};
        }
        int64_t number = 0;
        if (!parse_number(text, number) || number < Low || number > High) {
            return {1, string(text) + " is not in " + to_string(Low) + " to " + to_string(High)};
        }
        config.*Member = T(number);
    }
    return {};
}

Error set_workers(Config& config, string_view text) {
    if (text != "auto") { return set<&Config::workers, 1, 1000>(config, text); }
    config.workers = static_cast<int>(std::clamp(::sysconf(_SC_NPROCESSORS_ONLN), 1L, 1000L));
    return {};
}

Error set_worker_class(Config&, string_view text) {
    return text == "sync" ? Error{} : Error{1, "'" + string(text) + "': only sync exists here"};
}

constexpr const char* kLevels[] = {"debug", "info", "warning", "error", "critical"};

Error set_loglevel(Config& config, string_view text) {
    config.loglevel = text;
    const bool known = std::find(std::begin(kLevels), std::end(kLevels), text) != std::end(kLevels);
    return known ? Error{} : Error{1, "'" + string(text) + "' is no level"};
}

Error set_env(Config& config, string_view text) {
    const size_t equals = text.find('=');
    const bool good = equals != 0 && equals != string::npos;
    if (!good) { return {1, "'" + string(text) + "' sets nothing"}; }
    return set<&Config::raw_env>(config, text);
}

struct Option {
    char letter;
    const char *name, *meta, *help;  // meta nullptr: takes no value
    Error (*set)(Config&, string_view);
    string (*get)(const Config&);
};

using C = Config;
constexpr int64_t kYear = 31'536'000, kMiB = int64_t{1} << 20;
constexpr Option kOptions[] = {
    {'b', "bind", "ADDRESS", "HOST:PORT, [V6]:PORT, :PORT, unix:PATH or fd://N; may be repeated",
     set<&C::bind>, get<&C::bind>},
    {'w', "workers", "N", "worker processes; auto: one a processor; $WEB_CONCURRENCY sets it too",
     set_workers, get<&C::workers>},
    {'k', "worker-class", "NAME", "only sync", set_worker_class, get<&C::worker_class>},
    {'t', "timeout", "SECONDS", "end an application or worker silent for so long; 0: never",
     set<&C::timeout, 0, kYear>, get<&C::timeout>},
    {0, "graceful-timeout", "SECONDS", "what a stopping worker has to finish its requests",
     set<&C::graceful_timeout, 0, kYear>, get<&C::graceful_timeout>},
    {0, "header-timeout", "SECONDS", "what a client has to send the head of its request",
     set<&C::header_timeout, 1, kYear>, get<&C::header_timeout>},
    {0, "backlog", "N", "connections that the kernel holds until they are accepted",
     set<&C::backlog, 1, 65535>, get<&C::backlog>},
    {0, "worker-connections", "N", "connections that one worker holds",
     set<&C::worker_connections, 1>, get<&C::worker_connections>},
    {0, "limit-request-line", "BYTES", "longest request line; 0: the head's cap of 1 MiB",
     set<&C::limit_request_line, 0, kMiB>, get<&C::limit_request_line>},
    {0, "limit-request-fields", "N", "most header fields in a request",
     set<&C::limit_request_fields, 1, 32768>, get<&C::limit_request_fields>},
    {0, "limit-request-field_size", "BYTES", "longest header field; 0: the default",
     set<&C::limit_request_field_size, 0, kMiB>, get<&C::limit_request_field_size>},
    {0, "limit-request-body", "BYTES", "longest request body; 0: no limit",
     set<&C::limit_request_body, 0, INT64_MAX>, get<&C::limit_request_body>},
    {0, "chdir", "DIR", "change to this directory first", set<&C::chdir>, get<&C::chdir>},
    {0, "pythonpath", "DIR", "where to import from, before the directory; commas between several",
     set<&C::pythonpath>, get<&C::pythonpath>},
    {'e', "env", "NAME=VALUE", "set a variable for the application; may be repeated", set_env,
     get<&C::raw_env>},
    {0, "worker-tmp-dir", "DIR", "for heartbeat files; else /dev/shm, $TMPDIR or /tmp",
     set<&C::worker_tmp_dir>, get<&C::worker_tmp_dir>},
    {0, "access-logfile", "FILE", "write an access log; -: to stdout", set<&C::accesslog>,
     get<&C::accesslog>},
    {0, "access-logformat", "FORMAT", "what its lines look like", set<&C::access_log_format>,
     get<&C::access_log_format>},
    {0, "error-logfile", "FILE", "for messages and all that the application prints; -: stderr",
     set<&C::errorlog>, get<&C::errorlog>},
    {0, "log-file", "FILE", "the same as --error-logfile", set<&C::errorlog>, nullptr},
    {0, "log-level", "LEVEL", "debug, info, warning, error or critical", set_loglevel,
     get<&C::loglevel>},
    {0, "python", "PATH", "the Python that runs the application", set<&C::python>, get<&C::python>},
    {0, "runner", "CMD", "a program that answers in place of Python", set<&C::runner>,
     get<&C::runner>},
    {0, "check-config", nullptr, "check the settings, load the application, and exit",
     set<&C::check_config>, nullptr},
    {0, "print-config", nullptr, "print the settings and exit", set<&C::print_config>, nullptr},
    {'v', "version", nullptr, "print the version and exit", set<&C::version>, nullptr},
    {'h', "help", nullptr, "print this help and exit", set<&C::help>, nullptr},
};

/// Reads -x VALUE, -xVALUE, --name VALUE or --name=VALUE. `next` is the argument after it, if
/// any; it becomes nullptr where it was the value.
Error parse_option(Config& config, string_view arg, const char*& next) {
    const bool is_long = arg.substr(0, 2) == "--";
    const size_t end = is_long ? std::min(arg.find('='), arg.size()) : 2;
    const string_view name = arg.substr(is_long ? 2 : 1, end - (is_long ? 2 : 1));
    const bool attached = arg.size() > end;
    for (const Option& option : kOptions) {
        if (is_long ? name != option.name : option.letter != name.front()) { continue; }
        if (option.meta == nullptr && attached) { return {2, string(arg) + " takes no value"}; }
        string_view value;
        if (attached) {
            value = arg.substr(end + (is_long ? 1 : 0));
        } else if (option.meta != nullptr) {
            if (next == nullptr) { return {2, string(arg) + " needs a value"}; }
            value = std::exchange(next, nullptr);
        }
        Error error = option.set(config, value);
        if (error) { error.text = string("--") + option.name + ": " + error.text; }
        return error;
    }
    return {2, "unknown option " + string(arg)};
}

/// Settings from the environment and, stronger, the arguments. A code of 2: not understood.
Error parse_command_line(const std::vector<const char*>& args, Config& config) {
    const auto variable = [](const char* name) {
        const char* value = std::getenv(name);
        return string_view(value != nullptr ? value : "");
    };
    if (const string_view count = variable("WEB_CONCURRENCY"); !count.empty()) {
        const Error error = set_workers(config, count);
        if (error) { return {1, "$WEB_CONCURRENCY: " + error.text}; }
    }
    bool options = true, have_app = false;
    for (size_t i = 0; i < args.size(); ++i) {
        const string_view arg = args[i];
        if (options && arg == "--") {
            options = false;
        } else if (options && arg.size() > 1 && arg.front() == '-') {
            const char* next = i + 1 < args.size() ? args[i + 1] : nullptr;
            const bool has_next = next != nullptr;
            if (Error error = parse_option(config, arg, next)) { return error; }
            i += has_next && next == nullptr ? 1 : 0;
        } else if (std::exchange(have_app, true)) {
            return {2, "one application only, not also '" + string(arg) + "'"};
        } else {
            config.app = arg;
        }
    }
    if (config.bind.empty()) {
        const string_view port = variable("PORT");
        config.bind = {port.empty() ? "127.0.0.1:8000" : "0.0.0.0:" + string(port)};
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
        string value = option.get != nullptr ? option.get(defaults) : "";
        if (!value.empty()) { value = " [" + value + "]"; }
        std::printf("  %s--%s %s\n        %s%s\n", letter.c_str(), option.name,
                    option.meta != nullptr ? option.meta : "", option.help, value.c_str());
    }
}

void print_config(const Config& config) {
    std::printf("%-25s = %s\n", "app", config.app.c_str());
    for (const Option& option : kOptions) {
        if (option.get == nullptr) { continue; }
        std::printf("%-25s = %s\n", option.name, option.get(config).c_str());
    }
}

// ============================================================================
//  3. Logs
//
//  A line is one write, so that lines of several processes never mix. Whatever a client sent
//  is escaped before it gets here.
// ============================================================================
enum class Level { Debug, Info, Warning, Error, Critical };

struct Logger {
    Fd error_file, access_file;
    Level level = Level::Info;
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
    char text[16384];  // room for a request line at the default limit, escaped
    va_list args;
    va_start(args, format);
    std::vsnprintf(text, sizeof text, format, args);
    va_end(args);
    string name = kLevels[static_cast<int>(level)];
    for (char& c : name) { c = static_cast<char>(c - 32); }
    const string line = local_time("[%Y-%m-%d %H:%M:%S %z] [") + to_string(::getpid()) + "] [" +
                        name + "] " + text + "\n";
    (void)write_all(g_log.error_file, line);
}

/// Opens a log file, or opens it again; "-" is a standard descriptor. An empty path: no log.
Error open_log(const string& path, int standard, Fd& file) {
    if (path.empty()) { return {}; }
    Fd fd(path == "-" ? ::fcntl(standard, F_DUPFD_CLOEXEC, 0)
                      : ::open(path.c_str(), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666));
    if (!fd) { return os_error("cannot open the log " + path); }
    file = raise_fd(std::move(fd));
    return {};
}

Error open_logs(const Config& config) {
    while (config.loglevel != kLevels[static_cast<int>(g_log.level)]) {
        g_log.level = static_cast<Level>((static_cast<int>(g_log.level) + 1) % 5);
    }
    Error error = open_log(config.errorlog, STDERR_FILENO, g_log.error_file);
    return error ? error : open_log(config.accesslog, STDOUT_FILENO, g_log.access_file);
}

/// The value of a name in an environ block: NAME NUL value NUL …
string_view lookup(string_view block, string_view name) {
    while (!block.empty()) {
        const string_view key = cut(block, '\0'), value = cut(block, '\0');
        if (key == name) { return value; }
    }
    return {};
}

/// The value of a field in a response head, empty if there is none.
string_view head_field(string_view head, string_view name) {
    while (!head.empty()) {
        string_view line = cut(head, '\r');
        head.remove_prefix(std::min<size_t>(1, head.size()));
        if (same_name(cut(line, ':'), name)) { return trim(line); }
    }
    return {};
}

/// "User-Agent" as the environ's HTTP_USER_AGENT (RFC 3875 section 4.1.18).
string environ_name(string_view field) {
    string name = "HTTP_";
    for (const char c : field) {
        name += c == '-' ? '_' : c >= 'a' && c <= 'z' ? static_cast<char>(c - 32) : c;
    }
    return name == "HTTP_CONTENT_TYPE" || name == "HTTP_CONTENT_LENGTH" ? name.substr(5) : name;
}

/// The user of a Basic authorization, empty if there is none (RFC 7617 section 2).
string basic_user(string_view credentials) {
    static constexpr string_view kAlphabet =
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    if (!same_name(cut(credentials, ' '), "basic")) { return ""; }
    string text;
    uint32_t bits = 0;
    int count = 0;  // of the bits that are no whole byte yet
    for (const char c : trim(credentials)) {
        const size_t digit = kAlphabet.find(c);
        if (digit == string::npos) { break; }
        bits = bits << 6 | static_cast<uint32_t>(digit);
        count += count < 2 ? 6 : -2;
        if (count < 6) { text += static_cast<char>(bits >> count & 0xff); }
    }
    return text.substr(0, text.find(':') == string::npos ? 0 : text.find(':'));
}

/// What an access-log line tells of one request.
struct Access {
    string_view env, head;  // environ block; head of the response
    string line, peer;      // request line; the client's address
    int status = 0;
    int64_t body_bytes = 0;
    std::chrono::microseconds took{};
};

/// One atom: "h", "{referer}i" … An unknown one, or one without a value, is "-".
string access_atom(string_view name, const Access& a) {
    const auto shown = [](string_view text) { return text.empty() ? "-" : escape(text); };
    const int64_t us = a.took.count();
    if (name.size() > 3 && name.front() == '{') {
        const string_view key = name.substr(1, name.size() - 3);
        if (name.back() == 'o') { return shown(head_field(a.head, key)); }
        return shown(lookup(a.env, name.back() == 'i' ? environ_name(key) : string(key)));
    }
    switch (name.size() == 1 ? name.front() : '\0') {
        case 'h': return escape(a.peer);
        case 'u': return shown(basic_user(lookup(a.env, "HTTP_AUTHORIZATION")));
        case 't': return local_time("[%d/%b/%Y:%H:%M:%S %z]");
        case 'r': return shown(a.line);
        case 'm': return shown(lookup(a.env, "REQUEST_METHOD"));
        case 'U': return shown(lookup(a.env, "PATH_INFO"));
        case 'q': return escape(lookup(a.env, "QUERY_STRING"));
        case 'H': return shown(lookup(a.env, "SERVER_PROTOCOL"));
        case 's': return to_string(a.status);
        case 'B': return to_string(a.body_bytes);
        case 'b': return a.body_bytes != 0 ? to_string(a.body_bytes) : "-";
        case 'f': return shown(lookup(a.env, "HTTP_REFERER"));
        case 'a': return shown(lookup(a.env, "HTTP_USER_AGENT"));
        case 'T': return to_string(us / 1000000);
        case 'M': return to_string(us / 1000);
        case 'D': return to_string(us);
        case 'p': return "<" + to_string(::getpid()) + ">";
        case 'L': break;
        default: return "-";
    }
    return to_string(us / 1000000) + "." + to_string(1000000 + us % 1000000).substr(1);
}

/// A line of `format` with its %(atom)s replaced; other text stays as it is.
string access_line(string_view format, const Access& access) {
    string line;
    while (!format.empty()) {
        const size_t end = format.substr(0, 2) == "%(" ? format.find(")s") : string::npos;
        line += end == string::npos ? string(1, format.front())
                                    : access_atom(format.substr(2, end - 2), access);
        format.remove_prefix(end == string::npos ? 1 : end + 2);
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
    const Error bad{1, "'" + string(text) + "' is no address to listen on"};
    Address a;
    int64_t number = 0;
    if (text.substr(0, 5) == "fd://") {
        if (!parse_number(text.substr(5), number) || number >= FD_SETSIZE) { return bad; }
        a.fd = static_cast<int>(number);
        return a;
    }
    if (text.substr(0, 5) == "unix:") {
        a.path = text.substr(text.substr(5, 2) == "//" ? 7 : 5);
        if (a.path.empty() || a.path.size() >= sizeof(sockaddr_un::sun_path)) { return bad; }
        return a;
    }
    a.v6 = text.substr(0, 1) == "[";
    const size_t end = std::min(a.v6 ? text.find(']') : text.find(':'), text.size());
    a.host = text.substr(a.v6 ? 1 : 0, end - (a.v6 ? 1 : 0));
    string_view rest = text.substr(std::min(end + (a.v6 ? 1 : 0), text.size()));
    a.port = rest.empty() ? "8000" : string(rest.substr(1));
    if (text.empty() || (a.v6 && end == text.size()) || (!rest.empty() && rest.front() != ':') ||
        !parse_number(a.port, number) || number > 65535) {
        return bad;
    }
    return a;
}

struct Listener {
    Fd fd;
    string text, path;      // as in the log: http://127.0.0.1:8000; of a unix socket, to remove
    string host, port;      // SERVER_NAME and SERVER_PORT; empty on a unix socket
    bool wildcard = false;  // bound to all addresses: each connection has its own
    ino_t inode = 0;        // of the path, while it is ours
};

/// The numeric host and port of a socket address; both empty for a unix socket.
std::pair<string, string> address_text(const sockaddr_storage& address) {
    char host[INET6_ADDRSTRLEN] = "";
    const auto& v4 = reinterpret_cast<const sockaddr_in&>(address);
    const auto& v6 = reinterpret_cast<const sockaddr_in6&>(address);
    if (address.ss_family == AF_INET) {
        ::inet_ntop(AF_INET, &v4.sin_addr, host, sizeof host);
        return {host, to_string(ntohs(v4.sin_port))};
    }
    if (address.ss_family != AF_INET6) { return {}; }
    ::inet_ntop(AF_INET6, &v6.sin6_addr, host, sizeof host);
    return {host, to_string(ntohs(v6.sin6_port))};
}

sockaddr_storage socket_name(int fd) {
    sockaddr_storage address{};
    socklen_t size = sizeof address;
    ::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size);
    return address;
}

/// Fills in what the log and the environ need of a socket, which must be listening.
Result<Listener> describe(Fd fd) {
    Listener listener;
    int listening = 0;
    socklen_t size = sizeof listening;
    if (::getsockopt(fd.get(), SOL_SOCKET, SO_ACCEPTCONN, &listening, &size) < 0 || !listening) {
        return Error{1, "descriptor " + to_string(fd.get()) + " is no listening socket"};
    }
    const sockaddr_storage name = socket_name(fd.get());
    std::tie(listener.host, listener.port) = address_text(name);
    const bool v6 = name.ss_family == AF_INET6;
    listener.wildcard = listener.host == (v6 ? "::" : "0.0.0.0");
    const string host = v6 ? "[" + listener.host + "]" : listener.host;
    listener.text = "http://" + host + ":" + listener.port;
    if (name.ss_family == AF_UNIX) {
        listener.text = string("unix:") + reinterpret_cast<const sockaddr_un&>(name).sun_path;
    }
    set_flags(fd.get(), true);
    listener.fd = std::move(fd);
    return listener;
}

/// Makes way for a unix socket: removes a stale one, never a live one or another kind of file.
Error clear_path(const string& path, const sockaddr_un& name) {
    struct stat info {};
    if (::lstat(path.c_str(), &info) < 0) { return {}; }
    if (!S_ISSOCK(info.st_mode)) { return {1, path + " exists and is no socket"}; }
    const Fd probe(::socket(AF_UNIX, SOCK_STREAM, 0));
    set_flags(probe.get(), true);
    if (::connect(probe.get(), reinterpret_cast<const sockaddr*>(&name), sizeof name) == 0 ||
        errno != ECONNREFUSED) {
        return {1, "cannot listen on unix:" + path + ": another server does"};
    }
    ::unlink(path.c_str());
    return {};
}

/// Accepted sockets inherit it: the kernel holds little that it could not send yet, so that a
/// socket becomes writable soon after its client has read something, however slow it is.
void limit_unsent(int fd) {
#ifdef TCP_NOTSENT_LOWAT
    const int bytes = 2 * kPiece;
    ::setsockopt(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &bytes, sizeof bytes);
#else
    (void)fd;
#endif
}

/// Binds one address and listens.
Result<Listener> bind_address(const Address& address, int backlog) {
    if (address.fd >= 0) { return describe(Fd(address.fd)); }
    const bool tcp = address.path.empty();
    const string text = "cannot listen on " +
                        (tcp ? address.host + ":" + address.port : "unix:" + address.path);
    sockaddr_storage name{};
    socklen_t size = sizeof(sockaddr_un);
    if (tcp) {
        struct addrinfo hints {}, *found = nullptr;
        hints.ai_family = address.v6 ? AF_INET6 : AF_INET;
        hints.ai_socktype = SOCK_STREAM;
        hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
        const char* host = address.host.empty() ? nullptr : address.host.c_str();
        const int problem = ::getaddrinfo(host, address.port.c_str(), &hints, &found);
        if (problem != 0) { return Error{1, text + ": " + ::gai_strerror(problem)}; }
        std::memcpy(&name, found->ai_addr, size = found->ai_addrlen);
        ::freeaddrinfo(found);
    } else {
        auto& unix_name = reinterpret_cast<sockaddr_un&>(name);
        unix_name.sun_family = AF_UNIX;
        address.path.copy(unix_name.sun_path, sizeof unix_name.sun_path - 1);
        if (Error error = clear_path(address.path, unix_name)) { return error; }
    }
    Fd fd(::socket(name.ss_family, SOCK_STREAM, 0));
    const int on = 1;
    ::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (address.v6) { ::setsockopt(fd.get(), IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof on); }
    if (tcp) { limit_unsent(fd.get()); }
    const mode_t mask = ::umask(0);  // gunicorn's default: anyone may connect to a unix socket
    const int bound = ::bind(fd.get(), reinterpret_cast<sockaddr*>(&name), size);
    ::umask(mask);
    if (bound < 0 || ::listen(fd.get(), backlog) < 0) { return os_error(text); }
    Result<Listener> made = describe(std::move(fd));
    struct stat info {};
    if (!tcp && ::lstat(address.path.c_str(), &info) == 0) {
        made.value.path = address.path;
        made.value.inode = info.st_ino;
    }
    return made;
}

/// Removes the unix sockets that are still ours.
void unlink_sockets(const std::vector<Listener>& listeners) {
    for (const Listener& each : listeners) {
        struct stat info {};
        if (each.path.empty() || ::lstat(each.path.c_str(), &info) < 0) { continue; }
        if (info.st_ino == each.inode) { ::unlink(each.path.c_str()); }
    }
}

// ============================================================================
//  5. Request: bytes to meaning
//
//  Nothing here touches a socket: input is a view of what has arrived so far. The same bytes
//  give the same result, whole or one by one. RFC 9112 throughout, and strict: what two
//  parsers could read in two ways is refused.
// ============================================================================
enum class Parse { Done, NeedMore, Bad };

constexpr size_t kMaxHead = size_t{1} << 20;       // bytes in a head, whatever the limits say
constexpr size_t kMaxChunkLine = size_t{8} << 10;  // bytes in a chunk-size line

struct Request {
    string method, target, path, query, host;       // host: of an absolute target
    int minor = 0;                                  // HTTP/1.minor, 0 or 1
    std::vector<std::pair<string, string>> fields;  // by environ name; repeated ones are joined
    int64_t length = -1;                            // Content-Length; -1: none
    bool chunked = false, expect_continue = false;
};

bool is_alnum(char c) { return is_digit(c) || (lower(c) >= 'a' && lower(c) <= 'z'); }

/// Nothing but letters, digits and `others`.
bool is_made_of(string_view text, string_view others) {
    return std::all_of(text.begin(), text.end(), [others](char c) {
        return is_alnum(c) || others.find(c) != string::npos;
    });
}

/// tchar (RFC 9110 section 5.6.2).
bool is_token(string_view text) { return !text.empty() && is_made_of(text, "!#$%&'*+-.^_`|~"); }

/// No controls but tab: the rule for field values (RFC 9110 section 5.5).
bool is_field_value(string_view text) {
    return std::none_of(text.begin(), text.end(), [](char c) {
        return (static_cast<unsigned char>(c) < ' ' && c != '\t') || c == 0x7f;
    });
}

/// The byte that %XX at text[i] stands for, -1 if it is malformed.
int percent_byte(string_view text, size_t i) {
    int64_t byte = -1;
    const bool good = i + 2 < text.size() && parse_number(text.substr(i + 1, 2), byte, 16);
    return good ? static_cast<int>(byte) : -1;
}

/// Decodes %XX; what is malformed stays as it is. False for %00.
bool percent_decode(string_view text, string& out) {
    for (size_t i = 0; i < text.size(); ++i) {
        const int byte = text[i] == '%' ? percent_byte(text, i) : -1;
        if (byte == 0) { return false; }
        out += byte < 0 ? text[i] : static_cast<char>(byte);
        i += byte < 0 ? 0 : 2;
    }
    return true;
}

/// host [ ":" port ] (RFC 3986 section 3.2.2); empty is a valid host.
bool is_host(string_view text) {
    const bool literal = text.substr(0, 1) == "[";
    const size_t end = literal ? text.find(']') : std::min(text.find(':'), text.size());
    if (end == string::npos) { return false; }
    const string_view name = text.substr(literal ? 1 : 0, end - (literal ? 1 : 0));
    const string_view port = text.substr(end + (literal ? 1 : 0));
    for (size_t i = 0; i < name.size(); ++i) {
        if (name[i] == '%' && percent_byte(name, i) < 0) { return false; }
    }
    in6_addr v6;
    return (literal ? ::inet_pton(AF_INET6, string(name).c_str(), &v6) == 1
                    : is_made_of(name, "%-._~!$&'()*+,;=")) &&
           (port.empty() || port.front() == ':') &&
           std::all_of(port.begin() + (port.empty() ? 0 : 1), port.end(), is_digit);
}

/// Cuts a field line in two (RFC 9112 section 5). False: obs-fold, a blank before the colon,
/// no name, or controls.
bool split_field(string_view line, string_view& name, string_view& value) {
    const bool colon = line.find(':') != string::npos;
    name = cut(line, ':');
    value = trim(line);
    return colon && is_token(name) && is_field_value(value);
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
        const Config& c = config_;
        const int limit = lines_ > 0 ? c.limit_request_field_size : c.limit_request_line;
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
        const size_t lower_case = r.method.find_first_of("abcdefghijklmnopqrstuvwxyz");
        if (r.method.size() < 3 || r.method.size() > 20 || lower_case != string::npos ||
            !is_token(r.method)) {
            return {400, "not a request method"};
        }
        if (r.target.empty() || r.target.find('\t') != string::npos || !is_field_value(r.target)) {
            return {400, "not a request target"};
        }
        const Error error = take_version(line, r);
        return error ? error : take_target(r);
    }

    /// "HTTP/" DIGIT "." DIGIT (RFC 9112 section 2.3); 1.2 and the like are served as 1.1.
    static Error take_version(string_view text, Request& r) {
        if (text.substr(0, 5) != "HTTP/") { return {400, "no HTTP version"}; }
        text.remove_prefix(5);
        const bool dot = text.find('.') != string::npos;
        const string_view major = cut(text, '.');
        int64_t ignored;
        if (!parse_number(major, ignored) || (dot && !parse_number(text, ignored))) {
            return {400, "not an HTTP version"};
        }
        r.minor = text == "0" ? 0 : 1;
        return major == "1" && text.size() == 1 ? Error{} : Error{505, "not HTTP/1"};
    }

    /// Origin, absolute and asterisk form (RFC 9112 section 3.2).
    static Error take_target(Request& r) {
        string_view rest = r.target;
        if (r.method == "CONNECT") { return {501, "CONNECT is for proxies"}; }
        if (rest == "*" && r.method != "OPTIONS") { return {400, "* is for OPTIONS"}; }
        if (rest.front() != '/' && rest != "*") {
            const string_view scheme = cut(rest, ':');
            const bool http = same_name(scheme, "http") || same_name(scheme, "https");
            if (!http || rest.substr(0, 2) != "//") { return {400, "not a request target"}; }
            rest.remove_prefix(2);
            r.host = rest.substr(0, rest.find_first_of("/?#"));
            rest.remove_prefix(r.host.size());
            if (r.host.empty() || !is_host(r.host)) { return {400, "not a host in the target"}; }
        }
        rest = rest.substr(0, rest.find('#'));
        const string_view path = cut(rest, '?');
        r.query = rest;
        const bool good = percent_decode(path.empty() ? "/" : path, r.path);
        return good ? Error{} : Error{400, "NUL in the path"};
    }

    Error take_field(string_view line, Request& r) const {
        string_view name, value;
        if (lines_ - 1 > config_.limit_request_fields) { return {431, "too many header fields"}; }
        if (!split_field(line, name, value)) { return {400, "not a header field"}; }
        // X_Y and X-Y would be one name in the environ; HTTP_PROXY would steer outgoing requests.
        if (name.find('_') != string::npos || same_name(name, "proxy")) { return {}; }
        const string key = environ_name(name);
        const auto known = std::find_if(r.fields.begin(), r.fields.end(),
                                        [&](const auto& field) { return field.first == key; });
        const bool again = known != r.fields.end();
        if (key == "HTTP_HOST" && (again || !is_host(value))) { return {400, "not one good Host"}; }
        if (key == "CONTENT_TYPE" && again) { return {400, "two Content-Types"}; }
        if (key == "CONTENT_LENGTH" && (again || !parse_number(value, r.length))) {
            return {400, "not a Content-Length"};
        }
        if (again) {
            (known->second += key == "HTTP_COOKIE" ? "; " : ",") += value;
        } else {
            r.fields.emplace_back(key, value);
        }
        return {};
    }

    /// What only the whole head tells: framing of the body, Expect, the host.
    static Error finish(Request& r) {
        bool has_host = r.host.empty();
        for (auto& [name, value] : r.fields) {
            if (name == "HTTP_TRANSFER_ENCODING") {
                if (Error error = take_coding(value, r)) { return error; }
            } else if (name == "HTTP_EXPECT") {
                if (!same_name(value, "100-continue")) { return {417, "not an expectation"}; }
                r.expect_continue = r.minor > 0;
            } else if (name == "HTTP_HOST" && !has_host) {
                value = r.host;
                has_host = true;
            }
        }
        if (!has_host) { r.fields.emplace_back("HTTP_HOST", r.host); }
        return {};
    }

    /// Exactly one `chunked`, on HTTP/1.1, without a Content-Length: all else is how requests are
    /// smuggled (RFC 9112 section 6.1).
    static Error take_coding(string_view value, Request& r) {
        if (r.minor == 0 || r.length >= 0) { return {400, "Transfer-Encoding is not for here"}; }
        int codings = 0, chunked = 0;
        for (bool more = true; more; ++codings) {
            more = value.find(',') != string::npos;
            const string_view coding = trim(cut(value, ','));
            if (!is_token(coding) || chunked > 0) { return {400, "not a Transfer-Encoding"}; }
            chunked += same_name(coding, "chunked") ? 1 : 0;
        }
        r.chunked = true;
        return codings == chunked ? Error{} : Error{501, "a coding other than chunked"};
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
        chunked_ = request.chunked;
        part_ = chunked_ ? Part::Size : Part::Data;
        left_ = std::max<int64_t>(request.length, 0);
    }

    /// Takes from the front of `in`, and gives at most one piece of data. NeedMore without a
    /// piece: wait for more bytes, and keep what is left in `in`.
    Parse next(string_view& in, string_view& piece) {
        piece = {};
        while (!error_ && part_ != Part::End) {
            if (part_ == Part::Data) {
                piece = in.substr(0, static_cast<size_t>(std::min<int64_t>(left_, INT_MAX)));
                in.remove_prefix(piece.size());
                left_ -= static_cast<int64_t>(piece.size());
                if (left_ == 0) { part_ = chunked_ ? Part::DataEnd : Part::End; }
                if (left_ > 0 || !piece.empty()) { return Parse::NeedMore; }
            } else {
                const size_t end = in.find('\n');
                string_view line = in.substr(0, end);
                const bool crlf = !line.empty() && line.back() == '\r';
                if (crlf) { line.remove_suffix(1); }
                if (line.size() > longest_line()) {
                    error_ = part_ == Part::Trailers ? Error{431, "a trailer field is too long"}
                                                     : Error{400, "not a chunk"};
                } else if (end == string::npos) {
                    return Parse::NeedMore;
                } else {
                    in.remove_prefix(end + 1);
                    error_ = crlf ? take_line(line) : Error{400, "a line ends without CR"};
                }
            }
        }
        return error_ ? Parse::Bad : Parse::Done;
    }

    bool chunked() const { return chunked_; }
    const Error& error() const { return error_; }

private:
    enum class Part { Data, DataEnd, Size, Trailers, End };

    size_t longest_line() const {
        return part_ == Part::Size      ? kMaxChunkLine
               : part_ == Part::DataEnd ? 0
                                        : static_cast<size_t>(config_.limit_request_field_size);
    }

    /// A chunk-size line, the CRLF behind a chunk's data, a trailer field, or the last empty line.
    Error take_line(string_view line) {
        string_view name, value;
        if (part_ == Part::DataEnd) {
            part_ = Part::Size;
        } else if (part_ == Part::Size) {
            string_view size = line.substr(0, line.find(';'));
            const size_t end = size.find_last_not_of(" \t") + 1;
            if (size.size() < line.size()) { size = size.substr(0, end); }
            if (size.size() > 16 || !is_field_value(line) || !parse_number(size, left_, 16)) {
                return {400, "not a chunk size"};
            }
            part_ = left_ > 0 ? Part::Data : Part::Trailers;
        } else if (line.empty()) {
            part_ = Part::End;
        } else if (++trailers_ > config_.limit_request_fields) {
            return {431, "too many trailer fields"};
        } else if (!split_field(line, name, value) || same_name(name, "content-length") ||
                   same_name(name, "transfer-encoding") || same_name(name, "host")) {
            return {400, "not a trailer field"};
        }
        return {};
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
    string server, server_port, peer, peer_port;  // all empty on a unix socket
};

/// The environ block, NAME NUL value NUL …, CONTENT_LENGTH first (PEP 3333, SCGI).
string make_environ(const Request& r, const Endpoints& ends) {
    const char* script = std::getenv("SCRIPT_NAME");
    string_view prefix = script != nullptr ? script : "", path = r.path;
    if (path.substr(0, prefix.size()) != prefix ||
        (path.size() > prefix.size() && path[prefix.size()] != '/')) {
        prefix = {};  // the request is not below it: the two together must give its path
    }
    string_view server = ends.server, port = ends.server_port;
    const auto host = std::find_if(r.fields.begin(), r.fields.end(),
                                   [](const auto& field) { return field.first == "HTTP_HOST"; });
    if (server.empty() && host != r.fields.end()) {
        const size_t colon = host->second.find(':', host->second.rfind(']') + 1);
        server = string_view(host->second).substr(0, colon);
        port = string_view(host->second).substr(std::min(server.size() + 1, host->second.size()));
    }
    string block;
    block.reserve(1024);
    const auto add = [&block](string_view name, string_view value) {
        (((block += name) += '\0') += value) += '\0';
    };
    add("CONTENT_LENGTH", r.length < 0 ? "" : to_string(r.length));
    add("REQUEST_METHOD", r.method);
    add("SCRIPT_NAME", prefix);
    add("PATH_INFO", path.substr(prefix.size()));
    add("QUERY_STRING", r.query);
    add("RAW_URI", r.target);
    add("REQUEST_URI", r.target);
    add("SERVER_PROTOCOL", r.minor > 0 ? "HTTP/1.1" : "HTTP/1.0");
    add("SERVER_NAME", server);
    add("SERVER_PORT", port.empty() ? "80" : port);
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
struct Response {
    int status = 0;  // 0: nothing has been said yet
    string line, fields;
    int64_t length = -1;  // Content-Length; -1: none
    bool has_date = false, has_server = false;
    string dropped;  // hop-by-hop fields: they are not the application's to set
};

/// Reads "Status: 200 OK\nName: value\n…" as a runner sends it. An error says what is wrong.
Error parse_response(string_view head, Response& r) {
    static constexpr const char* kHopByHop[] = {
        "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te",
        "trailer", "trailers", "transfer-encoding", "upgrade"};
    int64_t status = 0;
    const bool named = cut(head, ' ') == "Status:";
    r.line = cut(head, '\n');
    if (!named || r.line.size() < 4 || r.line[3] != ' ' || !is_field_value(r.line) ||
        !parse_number(string_view(r.line).substr(0, 3), status) || status < 200) {
        return {500, "the status '" + escape(r.line) + "'"};
    }
    while (!head.empty()) {
        const string_view line = cut(head, '\n');
        string_view name, value;
        if (!split_field(line, name, value)) {
            return {500, "the header field '" + escape(line) + "'"};
        }
        const auto is = [&name](const char* other) { return same_name(name, other); };
        if (is("content-length") && (r.length >= 0 || !parse_number(value, r.length))) {
            return {500, "the Content-Length '" + escape(value) + "'"};
        }
        if (is("content-length") && status == 204) { continue; }  // RFC 9110 section 8.6
        if (std::any_of(std::begin(kHopByHop), std::end(kHopByHop), is)) {
            (r.dropped += r.dropped.empty() ? "" : ", ") += name;
            continue;
        }
        r.has_date = r.has_date || is("date");
        r.has_server = r.has_server || is("server");
        (((r.fields += name) += ": ") += value) += "\r\n";
    }
    r.status = static_cast<int>(status);
    return {};
}

/// The head as it goes to the client; the date as in RFC 9110 section 5.6.7.
string final_head(const Response& r, int minor, bool chunked) {
    static time_t last = 0;
    static char date[40];
    if (const time_t now = std::time(nullptr); now != std::exchange(last, now)) {
        struct tm parts {};
        ::gmtime_r(&now, &parts);
        std::strftime(date, sizeof date, "Date: %a, %d %b %Y %H:%M:%S GMT\r\n", &parts);
    }
    string head = minor > 0 ? "HTTP/1.1 " : "HTTP/1.0 ";
    (head += r.line) += r.has_server ? "\r\n" : "\r\nServer: server\r\n";
    ((head += r.has_date ? "" : date) += "Connection: close\r\n") += r.fields;
    return head += chunked ? "Transfer-Encoding: chunked\r\n\r\n" : "\r\n";
}

/// The server's own answer; it echoes nothing of the request.
Response error_response(int status, string& body) {
    static constexpr std::pair<int, const char*> kReasons[] = {
        {400, "Bad Request"}, {408, "Request Timeout"}, {413, "Content Too Large"},
        {414, "URI Too Long"}, {417, "Expectation Failed"},
        {431, "Request Header Fields Too Large"}, {500, "Internal Server Error"},
        {501, "Not Implemented"}, {502, "Bad Gateway"}, {503, "Service Unavailable"},
        {504, "Gateway Timeout"}, {505, "HTTP Version Not Supported"},
        {507, "Insufficient Storage"}};
    Response r;
    r.status = status;
    r.line = to_string(status);
    for (const auto& [code, reason] : kReasons) {
        if (code == status) { (r.line += " ") += reason; }
    }
    body = r.line + "\n";
    r.length = static_cast<int64_t>(body.size());
    r.fields = "Content-Type: text/plain\r\nContent-Length: " + to_string(r.length) + "\r\n";
    if (status == 503) { r.fields += "Retry-After: 10\r\n"; }
    return r;
}

// ============================================================================
//  7. Bridge: the runner, and the pipes to it
//
//  worker → runner   N:CONTENT_LENGTH NUL len NUL NAME NUL value NUL … ,body    a request (SCGI)
//                    0:,     the client has gone; only after a whole body, ignored when idle
//  runner → worker   0:,     once: the application is loaded
//                    N:Status: 200 OK\nName: value\n\n…,  N:more body,  …  0:,  a response (CGI)
//                    0:!     instead of 0:, where it failed; without a head the worker says 500
//
//  N is the number of bytes up to the comma; an empty len means that the client sent none. Any
//  program that speaks this on its standard input and output is a runner.
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
        lines = [("Status", status)]
        lines += headers
        head = ""
        for name, value in lines:
            if not isinstance(name, str) or not isinstance(value, str):
                raise TypeError("not a str in the status or the headers: %r" % ((name, value),))
            if ":" in name:
                raise ValueError("a colon in the header name %r" % name)
            head += "%s: %s\n" % (name, value)
        if head.count("\n") != len(lines):
            raise ValueError("a line break in the status or the headers: %r" % (lines,))
        self.head = head.encode("latin-1") + b"\n"
        return self.write

    def frame(self, data):
        """The netstring for a piece of the body, the head before the first."""
        if not isinstance(data, bytes):
            raise TypeError("the response is made of bytes, not %r" % type(data))
        if self.head is None:
            raise AssertionError("start_response was not called")
        if not self.started:
            data = self.head + data
            self.started = True
        return b"%d:%b," % (len(data), data) if data else b""

    def write(self, data):
        if self.slot is None:
            return
        if self.slot.client_gone():
            raise BrokenPipeError("the client has gone")
        self.send(data)

    def send(self, data):
        if data or not isinstance(data, bytes):  # the head waits for the first non-empty piece
            self.slot.write(self.frame(data))


class Slot:
    """A pair of pipes, and the loop that answers what comes through them."""

    def __init__(self, requests, replies, app):
        self.requests, self.replies, self.app = requests, replies, app
        self.pending = b""  # read and not used
        self.left = 0       # bytes of the body that the application has not read
        self.gone = False   # the client has
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
                self.pending = rest[int(size) + 1:]
                return rest[:int(size)]
            self.more()

    def take(self, size):
        """Some bytes of the body, `size` at most."""
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
            words = iter(block)
            environ = dict(zip(words, words), **base)
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
            items = self.app(environ, response.start_response)
            if isinstance(items, (list, tuple)):  # all is there: one write
                for item in items:
                    if not isinstance(item, bytes):
                        response.frame(item)
                self.write(response.frame(b"".join(items)) + b"0:,")
            else:
                for item in items:
                    if self.client_gone():
                        break
                    response.send(item)
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

    def put_null(fds):
        null = os.open(os.devnull, os.O_RDWR)
        for fd in fds:
            os.dup2(null, fd, fd < 3)
        os.close(null)

    put_null([0])
    os.dup2(2, 1)
    # A child that the application forks has no part in the bridge.
    os.register_at_fork(after_in_child=lambda: put_null(pipes))
    sys.path[:1] = [os.path.abspath(path) for path in paths.split(",") if path] + [os.getcwd()]
    try:
        slot = Slot(*pipes, load(name))
    except Exception:
        report()
        sys.exit(4)
    slot.write(b"0:,")
    slot.serve({
        "wsgi.version": (1, 0), "wsgi.url_scheme": "http", "wsgi.errors": sys.stderr,
        "wsgi.multithread": False, "wsgi.multiprocess": True, "wsgi.run_once": False,
        "wsgi.file_wrapper": FileWrapper, "wsgi.input_terminated": True,
        "SERVER_SOFTWARE": software})
)py";

/// Tells what the frames of a runner mean, piece by piece, however the bytes arrive.
class NetstringReader {
public:
    enum class Event { NeedMore, Piece, End, Failed, Bad };

    /// Takes from the front of `in`. Piece: part of a payload, perhaps not all of it.
    Event next(string_view& in, string_view& piece) {
        while (!in.empty()) {
            if (left_ > 0) {
                piece = in.substr(0, left_);
                in.remove_prefix(piece.size());
                left_ -= piece.size();
                return Event::Piece;
            }
            const char c = in.front();
            in.remove_prefix(1);
            if (std::exchange(in_payload_, false)) {
                const size_t size = std::exchange(size_, 0);
                if (c == '!' && size == 0) { return Event::Failed; }
                if (c != ',') { return Event::Bad; }
                if (size == 0) { return Event::End; }
            } else if (is_digit(c) && digits_++ < 12) {
                size_ = size_ * 10 + static_cast<size_t>(c - '0');
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
    string outgoing;                // a request's netstring, what is left of it
    Spool body;                     // and its body, which follows
    Connection* current = nullptr;  // null: nobody waits for this response any more
    string request;                 // its request line, once nobody waits
    bool answered = false;          // its end frame has come
    bool tell_gone = false;         // the runner is owed a "0:,"
    Time since{};                   // when the request went out
    Time deadline = Time::max();    // of the next frame
    Time kill_at = Time::max();     // SIGKILL for a runner that should be gone
    int signal = 0;                 // the last signal that we sent it
};

/// A Python literal for any text, so that settings travel in the source and not in the environ.
string python_literal(string_view text) {
    string out = "__import__('os').fsdecode(b'";
    for (const char c : text) {
        char hex[5];
        std::snprintf(hex, sizeof hex, "\\x%02x", static_cast<unsigned char>(c));
        out += hex;
    }
    return out + "')";
}

/// In the forked child: becomes the runner. Only its two pipes go with it.
[[noreturn]] void exec_runner(const Config& config, const Pair& pipes, const string& boot,
                              pid_t worker, rlim_t files) {
    for (int number = 1; number < NSIG; ++number) { set_signal(number, SIG_DFL); }
    ::setpgid(0, 0);  // Ctrl-C is for the server; and what the application forks can be ended too
    ::dup2(pipes.first.get(), STDIN_FILENO);
    ::dup2(pipes.second.get(), STDOUT_FILENO);
    ::dup2(g_log.error_file.get(), STDERR_FILENO);
    Strings gone{"NOTIFY_SOCKET"};  // what is between systemd and the server
    for (char** entry = environ; *entry != nullptr; ++entry) {
        const string name = string(*entry).substr(0, string_view(*entry).find('='));
        if (name.find("LISTEN_") == 0 || name.find("WATCHDOG_") == 0) { gone.push_back(name); }
    }
    for (const string& name : gone) { ::unsetenv(name.c_str()); }
    struct rlimit limit {};
    ::getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = files;
    ::setrlimit(RLIMIT_NOFILE, &limit);
#ifdef __linux__
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
#endif
    if (::getppid() != worker) { ::_exit(0); }
    block_signals(false);
    const string label = "server: runner [" + config.app + "]", command = "exec " + config.runner;
    const char* python = config.python.c_str();
    if (config.runner.empty()) {
        ::execlp(python, python, "-u", "-c", boot.c_str(), label.c_str(), nullptr);
    } else {
        ::execl("/bin/sh", "sh", "-c", command.c_str(), nullptr);
    }
    log(Level::Error, "cannot run %s: %s", python, std::strerror(errno));
    ::_exit(kWorkerBootError);
}

/// Starts a runner that imports the application. `files`: its soft limit on descriptors.
Error start_runner(const Config& config, Runner& runner, rlim_t files) {
    Result<Pair> requests = make_pipe(), replies = make_pipe();
    if (requests.error || replies.error) { return os_error("cannot make pipes for a runner"); }
    const string source = kRunner + ("\nmain(" + python_literal(config.app) + ", ") +
                          python_literal(join(config.pythonpath)) + ", 'server/" + kVersion +
                          "')\n";
    const string boot = "import sys; exec(compile(sys.stdin.buffer.read(" +
                        to_string(source.size()) + "), '<server runner>', 'exec'), {})";
    runner = Runner{};
    runner.to = std::move(requests.value.second);
    runner.from = std::move(replies.value.first);
    const Pair theirs{std::move(requests.value.first), std::move(replies.value.second)};
    const pid_t worker = ::getpid();
    block_signals(true);
    const pid_t pid = ::fork();
    if (pid == 0) { exec_runner(config, theirs, boot, worker, files); }
    block_signals(false);
    if (pid < 0) { return os_error("cannot fork"); }
    ::setpgid(pid, pid);  // here too: a signal to its group may be due before it runs
    if (config.runner.empty()) { (void)write_all(runner.to, source); }  // waitpid() tells if it died
    for (const Fd* end : {&runner.to, &runner.from}) { set_flags(end->get(), true); }
    runner.phase = Phase::Booting;
    runner.pid = pid;
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

constexpr auto kAcceptDelay = 10ms;   // how long a busy worker leaves connections to idle ones
constexpr auto kKillDelay = 500ms;    // from asking a process to go to SIGKILL
constexpr auto kLingerSilence = 2s, kLingerTotal = 10s;  // as nginx's lingering_close
#ifdef MSG_MORE
constexpr int kMore = MSG_MORE;  // the last bytes leave with the FIN, in one segment
#else
constexpr int kMore = 0;
#endif
constexpr size_t kReplyMemory = size_t{1} << 20, kWorkerMemory = size_t{16} << 20;

/// The part of a connection that goes through the ready queue as it is.
struct Passport {
    Time accepted, started;          // connected; the request was complete
    int64_t stored = 0;              // bytes of the body that are in a file
    size_t env_size = 0;
    int minor = 0;                   // HTTP/1.minor
    bool bodyless = false;           // HEAD, 204, 304: the response has no body
    bool more = false, eof = false;  // the client sent more than its request; half-closed
};

struct Connection {
    explicit Connection(const Config& config) : parser(config), reader(config) {}
    Fd socket;
    State state = State::ReadHead;
    Time deadline{};
    Passport pass;
    Endpoints ends;
    string in;  // read and not yet understood
    HeadParser parser;
    Request request;
    BodyReader reader;
    string env;                // environ block, once the head is complete
    Spool body, out;           // of the request; what the client has not taken yet
    string app_head, head;     // of the response, as the application sent it and as it goes out
    Response response;
    int64_t left = -1;         // of the response's Content-Length; -1: none
    int64_t body_bytes = 0;    // of the response, so far
    size_t counted = 0;        // bytes of `out` in Worker::reply_memory_
    bool chunked = false, too_long = false;     // the response is; has more than it announced
    bool complete = false, broken = false;      // no more will come; it must end visibly cut

    /// For logs: what the client sent, to be escaped.
    string request_line() const {
        if (env.empty()) { return in.substr(0, in.find_first_of("\r\n")); }
        const auto get = [this](string_view name) { return string(lookup(env, name)); };
        return get("REQUEST_METHOD") + " " + get("RAW_URI") + " " + get("SERVER_PROTOCOL");
    }
};

/// One datagram and its descriptors (SCM_RIGHTS), to be sent or received.
struct Datagram {
    alignas(cmsghdr) char control[CMSG_SPACE(2 * sizeof(int))] = {};
    struct iovec part {};
    struct msghdr message {};

    Datagram(char* data, size_t size, size_t descriptors) : part{data, size} {
        message.msg_iov = &part;
        message.msg_iovlen = 1;
        message.msg_control = control;
        message.msg_controllen = static_cast<decltype(message.msg_controllen)>(
            CMSG_SPACE(descriptors * sizeof(int)));
    }
};

constexpr size_t kMaxMessage = 4 * kPiece;

/// False where the queue is full, or the message larger than it takes.
bool send_message(int queue, string& data, const std::vector<int>& fds) {
    if (data.size() > kMaxMessage) { return errno = EMSGSIZE, false; }
    Datagram datagram(data.data(), data.size(), fds.size());
    cmsghdr* header = CMSG_FIRSTHDR(&datagram.message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = static_cast<decltype(header->cmsg_len)>(CMSG_LEN(fds.size() * sizeof(int)));
    std::memcpy(CMSG_DATA(header), fds.data(), fds.size() * sizeof(int));
    return retry([&] { return ::sendmsg(queue, &datagram.message, MSG_DONTWAIT); }) >= 0;
}

/// The size of the datagram received, or -1 where there is none.
ssize_t receive_message(int queue, char* data, size_t size, std::vector<Fd>& fds) {
    Datagram datagram(data, size, 2);
    const ssize_t n = retry([&] { return ::recvmsg(queue, &datagram.message, MSG_DONTWAIT); });
    const cmsghdr* header = n < 0 ? nullptr : CMSG_FIRSTHDR(&datagram.message);
    const size_t bytes = header == nullptr ? 0 : header->cmsg_len - CMSG_LEN(0);
    for (size_t i = 0; i < bytes / sizeof(int); ++i) {
        int fd;
        std::memcpy(&fd, CMSG_DATA(header) + i * sizeof fd, sizeof fd);
        set_flags(fd, false);
        fds.emplace_back(fd);
    }
    return n;
}

/// The heartbeat: the file's mode alternates, the arbiter reads its ctime. Bit 2: booted.
void notify_file(const Fd& file, bool booted, bool spinner) {
    ::fchmod(file.get(), static_cast<mode_t>((booted ? 2 : 0) + (spinner ? 1 : 0)));
}

// ============================================================================
//  9. Worker: one select loop between clients, the ready queue and the runner
// ============================================================================
class Worker {
public:
    /// `queue` is what every worker of every generation inherits; a byte into `arbiter` wakes it.
    Worker(const Config& config, std::vector<Listener>& listeners, const Pair& queue,
           const Fd& tmp, Fd arbiter, pid_t arbiter_pid, rlim_t files)
        : config_(config), listeners_(listeners), queue_(queue), tmp_(tmp),
          arbiter_(std::move(arbiter)), arbiter_pid_(arbiter_pid), files_(files) {}

    /// Serves until it is told to stop; returns the exit status.
    int run() {
        if (Error error = init_process()) {
            log(Level::Error, "Worker cannot boot: %s", error.text.c_str());
            return kWorkerBootError;
        }
        while (status_ == 0 && (runner_.phase != Phase::Down || has_work())) {
            fd_set reads = reads_, writes = writes_;
            const Time until = prepare(reads, writes);
            wait_ready(max_fd_, reads, writes, until);
            now_ = Clock::now();
            turn(reads, writes);
        }
        log(Level::Info, "Worker exiting (pid: %d)", ::getpid());
        return status_;
    }

private:
    // --- life -------------------------------------------------------------------------------

    Error init_process() {
        log(Level::Info, "Booting worker with pid: %d", ::getpid());
        FD_ZERO(&reads_);
        FD_ZERO(&writes_);
        if (Error error = init_signals()) { return error; }
        watch(g_self_pipe.first.get(), true, false);
        max_fd_ = std::max(max_fd_, queue_.second.get());
        for (const Listener& each : listeners_) { max_fd_ = std::max(max_fd_, each.fd.get()); }
        notify();
        return boot_runner();
    }

    static Error init_signals() {
        for (const int number : {SIGHUP, SIGUSR1, SIGWINCH, SIGTTIN, SIGTTOU, SIGPIPE}) {
            set_signal(number, SIG_IGN);
        }
        const Error error = open_self_pipe({SIGTERM, SIGUSR2, SIGINT, SIGQUIT, SIGCHLD});
        block_signals(false);
        return error;
    }

    /// Beats the heart: once a second, or twice in `timeout` where that is shorter.
    void notify() {
        spinner_ = !spinner_;
        notify_file(tmp_, booted_, spinner_);
        const auto half = std::chrono::milliseconds(config_.timeout) / 2;
        next_notify_ = now_ + (half > 0ms && half < 1s ? half : std::chrono::milliseconds(1s));
    }

    /// Whether a runner is still wanted.
    bool has_work() const {
        return !quick_ && (!stopping_ || connected_ > 0 ||
                           (draining_ && !dismissed_ && !queue_is_empty()));
    }

    void handle_signals() {
        for (int number; (number = next_signal()) >= 0;) {
            if (number == SIGCHLD) { reap_runner(); }
            draining_ = draining_ || number == SIGUSR2;
            if (number == SIGTERM || number == SIGUSR2) { stop(); }
            if (number == SIGINT || number == SIGQUIT) { stop_now(); }
        }
    }

    /// Graceful: what has been accepted is served, also by the kernel; then the listeners close.
    void stop() {
        if (std::exchange(stopping_, true)) { return; }
        if (booted_) { accept_clients(config_.backlog); }
        listeners_.clear();
        for (const auto& c : connections_) {
            if (!c || c->state != State::ReadHead || !c->in.empty()) { continue; }
            c->deadline = std::min(c->deadline, now_ + 1s);  // silent, but perhaps on its way
        }
        next_tick_ = now_;
    }

    void stop_now() {
        stopping_ = quick_ = true;
        listeners_.clear();
    }

    // --- the loop ---------------------------------------------------------------------------

    /// Completes the sets with what depends on the runner, and says when to wake at the latest.
    Time prepare(fd_set& reads, fd_set& writes) {
        Time until = std::min({next_tick_, next_notify_, ready_.empty() ? next_tick_ : next_pass_});
        if (runner_.from && !stalled()) { FD_SET(runner_.from.get(), &reads); }
        if (runner_.to && (!runner_.outgoing.empty() || runner_.body.size() > 0)) {
            FD_SET(runner_.to.get(), &writes);
        }
        if (runner_.phase == Phase::Idle) {
            ahead_ = 0;
            const bool room = connected_ <= config_.worker_connections || find_victim() != nullptr;
            if (room && takes_from_queue()) { FD_SET(queue_.second.get(), &reads); }
        }
        // A busy worker leaves connections to idle ones for a while: or all would wake for one.
        const Time accept_at = std::max(accept_again_, runner_.since + kAcceptDelay);
        const bool wait = runner_.phase == Phase::Busy && now_ < accept_at;
        for (const Listener& each : listeners_) {
            if (booted_ && !wait && now_ >= accept_again_) { FD_SET(each.fd.get(), &reads); }
        }
        return wait ? std::min(until, accept_at) : until;
    }

    void turn(const fd_set& reads, const fd_set& writes) {
        const auto is_set = [](const Fd& fd, const fd_set& set) {
            return fd && FD_ISSET(fd.get(), &set);
        };
        if (is_set(g_self_pipe.first, reads)) { handle_signals(); }
        if (is_set(runner_.to, writes)) { feed_runner(); }
        if (is_set(runner_.from, reads)) { read_runner(); }
        if (runner_.phase == Phase::Idle && is_set(queue_.second, reads)) {
            if (Connection* c = take_from_queue()) { dispatch(*c); }
        }
        for (int fd = 0; fd <= max_fd_; ++fd) {
            const bool readable = FD_ISSET(fd, &reads), writable = FD_ISSET(fd, &writes);
            Connection* c = connections_[fd].get();
            if (c == nullptr || !(readable || writable)) { continue; }
            if (writable) { flush(*c); }
            if (readable) { read_client(*c); }
            settle(*c);
        }
        for (const Listener& each : listeners_) {
            if (runner_.phase == Phase::Idle || !is_set(each.fd, reads)) { continue; }
            accept_clients(16);
            break;
        }
        run_ahead();
        if (now_ >= next_pass_) { pass_on(); }
        if (now_ >= next_notify_) { notify(); }
        if (now_ >= next_tick_) { tick(); }
        if (runner_.to && !has_work()) {  // it leaves as any Python program does, or is killed
            dismissed_ = true;
            runner_.to.reset();
            runner_.phase = Phase::Dying;
            kill_runner_after(quick_    ? Clock::duration(kKillDelay / 2)
                              : booted_ ? Clock::duration(config_.graceful_timeout)
                                        : Clock::duration(0));
        }
    }

    /// Gives an idle runner work, and goes on without select() while it answers at once: to yield
    /// the processor to it is cheaper than to sleep and be woken. After some rounds select() has to
    /// look at the ready queue.
    void run_ahead() {
        for (int round = 0; round < 64; ++round) {
            if (runner_.phase == Phase::Idle && booted_ && now_ >= accept_again_ && ahead_++ < 8) {
                accept_clients(16);
            }
            if (runner_.phase != Phase::Busy || runner_.since != now_) { return; }
            ::sched_yield();
            now_ = Clock::now();
            if (!read_runner()) { return; }
        }
    }

    /// Deadlines of all kinds.
    void tick() {
        next_tick_ = now_ + 1s;
        if (::getppid() != arbiter_pid_) { stop_now(); }
        for (const auto& c : connections_) {
            if (!c) { continue; }
            if (now_ >= c->deadline) { expire(*c); }
            next_tick_ = std::min(next_tick_, c->deadline);
            settle(*c);
        }
        if (now_ >= runner_.deadline) { hung_app(); }
        if (now_ >= runner_.kill_at) { signal_runner(SIGKILL); }
        if (runner_.phase == Phase::Down && now_ >= restart_at_ && has_work()) {
            if (Error error = boot_runner()) { log(Level::Error, "%s", error.text.c_str()); }
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
        const bool done = c.state == State::Done;
        const size_t used = done ? 0 : c.out.memory();
        reply_memory_ += used - std::exchange(c.counted, used);
        watch(c.socket.get(), !done && !c.pass.eof, !done && c.out.size() > 0);
        if (!done) { return; }
        --connected_;
        connections_[c.socket.get()].reset();
    }

    void set_state(Connection& c, State state) {
        const Time patience = config_.timeout > 0s ? now_ + config_.timeout : Time::max();
        if (c.state == State::Ready && state != State::Ready) {
            ready_.erase(std::remove(ready_.begin(), ready_.end(), &c), ready_.end());
        }
        c.state = state;
        switch (state) {
            case State::ReadHead: c.deadline = c.pass.accepted + config_.header_timeout; break;
            case State::ReadBody: c.deadline = patience; break;
            case State::Ready:
                c.deadline = config_.timeout > 0s ? c.pass.started + config_.timeout : patience;
                break;
            case State::Run: c.deadline = Time::max(); break;  // the runner's counts
            case State::Reply: c.deadline = patience; break;
            case State::Linger: c.deadline = now_ + kLingerSilence; break;
            case State::Done: c.deadline = Time::max(); break;
        }
        next_tick_ = std::min(next_tick_, c.deadline);
    }

    /// What becomes of a connection whose time is up.
    void expire(Connection& c) {
        switch (c.state) {
            case State::ReadHead:
                if (c.in.empty()) { return set_state(c, State::Done); }
                return refuse(c, {408, "the head of the request took too long"});
            case State::ReadBody: return refuse(c, {408, "the body of the request stopped coming"});
            case State::Ready: return refuse(c, {503, "no runner was to be had"});
            case State::Reply:
                if (c.out.size() == 0) { return set_state(c, State::Reply); }
                log(Level::Info, "The client took nothing: %s", escape(c.request_line()).c_str());
                return client_gone(c);
            case State::Linger: return set_state(c, State::Done);
            case State::Run:
            case State::Done: return;
        }
    }

    // --- clients ----------------------------------------------------------------------------

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

    /// Accepts up to `most` connections from each listener; but for an idle runner no more than it
    /// takes to make it busy: the rest is for the other workers.
    void accept_clients(int most) {
        const bool idle = runner_.phase == Phase::Idle && !stopping_;
        for (const Listener& listener : listeners_) {
            for (int i = 0; i < most && !(idle && runner_.phase == Phase::Busy); ++i) {
                const bool full = connected_ >= config_.worker_connections;
                if (full && find_victim() == nullptr) { return pause_accepting(); }
                sockaddr_storage peer{};
                Fd fd = accept_socket(listener.fd.get(), peer);
                if (!fd && (errno == EINTR || errno == ECONNABORTED)) { continue; }
                if (!fd && !would_block()) {
                    const int problem = errno;
                    log(Level::Error, "cannot accept: %s", std::strerror(problem));
                    if (problem == EMFILE || problem == ENFILE) { shed(); }
                    return pause_accepting();
                }
                if (fd && full) { shed(); }
                Connection* c = fd ? adopt(std::move(fd)) : nullptr;
                if (c == nullptr) { break; }
                std::tie(c->ends.peer, c->ends.peer_port) = address_text(peer);
                std::tie(c->ends.server, c->ends.server_port) =
                    listener.wildcard ? address_text(socket_name(c->socket.get()))
                                      : std::make_pair(listener.host, listener.port);
                c->pass.accepted = now_;
                set_state(*c, State::ReadHead);
                read_client(*c);
                settle(*c);
            }
        }
    }

    /// No spin around a listener that cannot be served until something is freed.
    void pause_accepting() {
        accept_again_ = now_ + 100ms;
        next_tick_ = std::min(next_tick_, accept_again_);
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

    /// Who has to go when there are too many: one that lingers, or else the one that has been
    /// unfinished for longest. Null: all are being served.
    Connection* find_victim() const {
        const auto rank = [](const Connection& c) {
            return std::make_pair(c.state != State::Linger, c.pass.accepted);
        };
        Connection* victim = nullptr;
        for (const auto& c : connections_) {
            if (!c || (c->state != State::Linger && c->state > State::ReadBody)) { continue; }
            if (victim == nullptr || rank(*c) < rank(*victim)) { victim = c.get(); }
        }
        return victim;
    }

    bool shed() {
        Connection* victim = find_victim();
        if (victim == nullptr) { return false; }
        if (victim->state == State::ReadBody || !victim->in.empty()) {
            refuse(*victim, {503, "too many connections"});
            (void)read_some(victim->socket, buffer_, kPiece);  // unread bytes would reset it
        }
        set_state(*victim, State::Done);
        settle(*victim);
        return true;
    }

    /// Reads what a client sent, and lets its state say what that means.
    void read_client(Connection& c) {
        const ssize_t n = c.state == State::Done ? 0 : read_some(c.socket, buffer_, kPiece);
        if (n < 0) { return would_block() ? void() : client_gone(c); }
        c.pass.eof = n == 0;  // a half-close: the client still gets its answer
        switch (c.state) {
            case State::ReadHead: c.in.append(buffer_, static_cast<size_t>(n)); return read_head(c);
            case State::ReadBody: c.in.append(buffer_, static_cast<size_t>(n)); return read_body(c);
            case State::Ready:
            case State::Run:
            case State::Reply: c.pass.more = c.pass.more || n > 0; return;
            case State::Linger: {
                const bool over = c.pass.eof || now_ >= c.pass.started + kLingerTotal;
                return set_state(c, over ? State::Done : State::Linger);
            }
            case State::Done: return;
        }
    }

    void read_head(Connection& c) {
        const Parse parsed = c.parser.parse(c.in, c.request);
        if (!c.request.path.empty()) { c.pass.minor = c.request.minor; }
        c.pass.bodyless = c.request.method == "HEAD";
        if (parsed == Parse::Bad) { return refuse(c, c.parser.error()); }
        if (parsed == Parse::NeedMore && c.pass.eof) {
            if (c.in.empty()) { return set_state(c, State::Done); }
            return refuse(c, {400, "the head ends early"});
        }
        if (parsed == Parse::NeedMore) { return; }
        const Request request = std::move(c.request);
        c.env = make_environ(request, c.ends);
        c.in.erase(0, c.parser.size());
        c.reader.start(request);
        set_state(c, State::ReadBody);
        if (too_large(request.length)) { return refuse(c, {413, "the body is too large"}); }
        if (request.expect_continue && c.in.empty() && (request.chunked || request.length > 0)) {
            c.out.append("HTTP/1.1 100 Continue\r\n\r\n", kReplyMemory);
            flush(c);
        }
        if (c.state == State::ReadBody) { read_body(c); }
    }

    bool too_large(int64_t body) const {
        return config_.limit_request_body > 0 && body > config_.limit_request_body;
    }

    void read_body(Connection& c) {
        string_view in = c.in, piece;
        Parse parsed = Parse::NeedMore;
        do {
            parsed = c.reader.next(in, piece);
            c.body.append(piece, kPiece);
        } while (parsed == Parse::NeedMore && !piece.empty());
        c.in.erase(0, c.in.size() - in.size());
        if (parsed == Parse::Bad) { return refuse(c, c.reader.error()); }
        if (too_large(c.body.size())) { return refuse(c, {413, "the body is too large"}); }
        if (c.body.failed()) { return refuse(c, {507, "no room on disk for the body"}); }
        if (parsed == Parse::Done) { return ready(c); }
        if (c.pass.eof) { return refuse(c, {400, "the body ends early"}); }
        set_state(c, State::ReadBody);
    }

    /// The request is complete: it runs at once, or waits, here for a moment or in the queue.
    void ready(Connection& c) {
        if (c.reader.chunked()) { c.env.insert(sizeof "CONTENT_LENGTH", to_string(c.body.size())); }
        c.pass.more = !c.in.empty();
        c.in = string();
        c.pass.started = now_;
        set_state(c, State::Ready);
        if (runner_.phase == Phase::Idle) { return dispatch(c); }
        ready_.push_back(&c);
        next_pass_ = std::min(next_pass_, now_ + 1ms);
    }

    /// Answers in the server's own name, whatever became of the request.
    void refuse(Connection& c, const Error& error) {
        log(error.code < 500 ? Level::Warning : Level::Error, "%d to %s: %s: %s", error.code,
            c.ends.peer.c_str(), error.text.c_str(), escape(c.request_line()).c_str());
        string body;
        c.response = error_response(error.code, body);
        c.head = final_head(c.response, c.pass.minor, false);
        if (c.pass.bodyless) { body.clear(); }
        c.body_bytes = static_cast<int64_t>(body.size());
        c.out.append(c.head + body, kReplyMemory);
        c.pass.more = c.pass.more || c.state < State::Ready;
        c.complete = true;
        set_state(c, State::Reply);
        flush(c);
    }

    /// Sends what there is; ends the response once all of it has gone.
    void flush(Connection& c) {
        while (c.out.size() > 0) {
            const string_view data = c.out.front();
            const bool last = c.complete && !c.pass.more && !c.broken;
            const ssize_t n = retry([&] {
                return ::send(c.socket.get(), data.data(), data.size(), last ? kMore : 0);
            });
            if (n < 0) { return would_block() ? void() : client_gone(c); }
            c.out.pop(static_cast<size_t>(n));
            if (c.state == State::Reply) { set_state(c, State::Reply); }
        }
        if (c.complete) { finish(c); }
    }

    /// All has been sent. A close with bytes unread would reset the connection, and might take the
    /// response with it: then half-close, and read on (RFC 9112 section 9.6).
    void finish(Connection& c) {
        write_access(c, c.response.status);
        if (c.broken && !c.chunked && c.left < 0 && !c.pass.bodyless) {
            const struct linger reset = {1, 0};  // only a reset shows that this response is cut
            ::setsockopt(c.socket.get(), SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
            return set_state(c, State::Done);
        }
        if (!c.pass.more || c.pass.eof) { return set_state(c, State::Done); }
        ::shutdown(c.socket.get(), SHUT_WR);
        c.pass.started = now_;
        set_state(c, State::Linger);
    }

    /// A reset or a failed write: nobody is there to be answered.
    void client_gone(Connection& c) {
        const bool silent = c.state == State::ReadHead && c.in.empty();
        if (c.state != State::Linger && !silent) {
            write_access(c, c.response.status != 0 ? c.response.status : 499);
        }
        if (runner_.current == &c) { abandon(c); }
        set_state(c, State::Done);
    }

    void write_access(const Connection& c, int status) const {
        if (!g_log.access_file) { return; }
        const Time start = c.pass.started != Time{} ? c.pass.started : c.pass.accepted;
        const int64_t bytes = std::max<int64_t>(c.body_bytes - c.out.size(), 0);  // less if cut
        const auto took = std::chrono::ceil<std::chrono::microseconds>(Clock::now() - start);
        const Access access{c.env, c.head, c.request_line(), c.ends.peer, status, bytes, took};
        (void)write_all(g_log.access_file, access_line(config_.access_log_format, access));
    }

    // --- the ready queue --------------------------------------------------------------------

    /// Sends requests that have waited long enough to whichever worker has an idle runner first.
    /// A head too large for a datagram stays, and waits for the runner of this worker.
    void pass_on() {
        next_pass_ = Time::max();
        for (size_t i = 0; i < ready_.size();) {
            Connection& c = *ready_[i];
            // As long as the runner gets through its requests quickly, waiting here is quicker.
            const Time since = c.pass.started;
            next_pass_ = std::max(since, std::min(runner_.since, since + 9ms)) + 1ms;
            if (now_ < next_pass_) { return; }
            c.pass.stored = c.body.stored();
            c.pass.env_size = c.env.size();
            string message(reinterpret_cast<const char*>(&c.pass), sizeof c.pass);
            message += c.env;
            if (c.body.memory() > 0) { message += c.body.front(); }
            std::vector<int> fds{c.socket.get()};
            if (c.pass.stored > 0) { fds.push_back(c.body.file().get()); }
            next_pass_ = now_ + 10ms;
            if (send_message(queue_.first.get(), message, fds)) {
                set_state(c, State::Done);
                settle(c);
            } else if (errno == EMSGSIZE) {
                ++i;
            } else {
                return;
            }
        }
    }

    /// A worker that leaves alone, or makes way for a new one, leaves the queue to the others.
    bool takes_from_queue() const { return !stopping_ || draining_; }

    /// The request that has waited longest in the queue, null if there is none to be had.
    Connection* take_from_queue() {
        // One more than the limit: a descriptor that finds no room is lost with its request.
        while (takes_from_queue() && (connected_ <= config_.worker_connections || shed())) {
            std::vector<Fd> fds;
            const ssize_t n = receive_message(queue_.second.get(), buffer_, sizeof buffer_, fds);
            if (n < static_cast<ssize_t>(sizeof(Passport)) || fds.empty()) { return nullptr; }
            Connection* c = adopt(std::move(fds[0]));
            if (c == nullptr) { return nullptr; }
            std::memcpy(&c->pass, buffer_, sizeof c->pass);
            string_view data(buffer_, static_cast<size_t>(n));
            data.remove_prefix(sizeof c->pass);
            c->env = data.substr(0, c->pass.env_size);
            c->body.append(data.substr(c->env.size()), data.size());
            if (fds.size() > 1) { c->body.adopt_file(raise_fd(std::move(fds[1])), c->pass.stored); }
            c->ends.peer = lookup(c->env, "REMOTE_ADDR");
            set_state(*c, State::Ready);
            if (now_ >= c->deadline) { expire(*c); }
            if (c->state == State::Ready && !c->pass.eof) { read_client(*c); }  // has it gone?
            if (c->state == State::Ready) { return c; }
            settle(*c);
        }
        return nullptr;
    }

    bool queue_is_empty() const {
        char byte;
        return ::recv(queue_.second.get(), &byte, 1, MSG_PEEK | MSG_DONTWAIT) < 0;
    }

    /// Answers what has waited in the queue too long while no runner came to take it.
    void expire_queue() {
        Passport pass;
        while (config_.timeout > 0s &&
               ::recv(queue_.second.get(), &pass, sizeof pass, MSG_PEEK | MSG_DONTWAIT) > 0 &&
               now_ >= pass.started + config_.timeout) {
            if (Connection* c = take_from_queue()) { ready_.push_back(c); }
            next_pass_ = now_;
        }
    }

    // --- the runner -------------------------------------------------------------------------

    bool stalled() const { return runner_.current != nullptr && runner_.current->out.full(); }

    void dispatch(Connection& c) {
        set_state(c, State::Run);
        runner_.outgoing = to_string(c.env.size()) + ":" + c.env + ",";
        runner_.body = std::move(c.body);
        if (runner_.body.memory() > 0) {
            const string_view part = runner_.body.front();
            runner_.outgoing += part;
            runner_.body.pop(part.size());
        }
        runner_.current = &c;
        runner_.phase = Phase::Busy;
        runner_.answered = runner_.tell_gone = false;
        runner_.since = now_;
        extend_deadline();
        feed_runner();
    }

    /// A sign of life: the application gets `timeout` seconds from now.
    void extend_deadline() {
        runner_.deadline = config_.timeout > 0s ? now_ + config_.timeout : Time::max();
        next_tick_ = std::min(next_tick_, runner_.deadline);
    }

    void feed_runner() {
        while (runner_.to) {
            const bool all = runner_.outgoing.empty() && runner_.body.size() == 0;
            if (all && !std::exchange(runner_.tell_gone, false)) { return become_idle(); }
            if (all) { runner_.outgoing = "0:,"; }
            const bool head = !runner_.outgoing.empty();
            const string_view data = head ? runner_.outgoing : runner_.body.front();
            const ssize_t n = write_some(runner_.to, data);
            if (n < 0 && !would_block()) {  // it ends; but it may have answered
                runner_.to.reset();
                kill_runner_after(1s);
            }
            if (n < 0) { return; }
            head ? void(runner_.outgoing.erase(0, static_cast<size_t>(n)))
                 : runner_.body.pop(static_cast<size_t>(n));
        }
    }

    /// Reads once what the runner says; false where there is nothing more to read.
    bool read_runner() {
        using Event = NetstringReader::Event;
        const ssize_t n = read_some(runner_.from, buffer_, kPiece);
        if (n < 0 && would_block()) { return false; }
        if (n <= 0) { return lose_runner(), false; }
        if (runner_.phase == Phase::Busy) { extend_deadline(); }
        string_view in(buffer_, static_cast<size_t>(n)), piece;
        for (Event event; (event = runner_.reader.next(in, piece)) != Event::NeedMore;) {
            const bool last = event == Event::End || event == Event::Failed;
            const bool quiet = runner_.phase == Phase::Booting || runner_.phase == Phase::Idle;
            if (event == Event::Bad || (last && !in.empty()) || (quiet && event != Event::End)) {
                log(Level::Error, "Runner (pid:%d) broke the protocol", runner_.pid);
                signal_runner(SIGKILL);
                return lose_runner(), false;
            }
            if (last) { end_reply(event == Event::End); }
            if (event == Event::Piece && runner_.current != nullptr) {
                take_reply(*runner_.current, piece);
            }
        }
        Connection* c = runner_.current;
        if (c == nullptr || c->state != State::Reply) { return true; }
        flush(*c);
        settle(*c);
        return true;
    }

    /// A piece of the response. The application's head is checked before anything is sent.
    void take_reply(Connection& c, string_view piece) {
        if (c.response.status != 0) { return reply_body(c, piece); }
        if (!c.app_head.empty()) { piece = c.app_head += piece; }
        const size_t end = piece.find("\n\n");
        if (end == string::npos && piece.size() <= kMaxHead) {
            if (c.app_head.empty()) { c.app_head = piece; }
            return;
        }
        Error error{500, "a head without end"};
        if (end != string::npos) { error = parse_response(piece.substr(0, end + 1), c.response); }
        if (error) {
            abandon(c);
            refuse(c, {500, "the application sent " + error.text});
            return settle(c);
        }
        const Response& r = c.response;
        if (!r.dropped.empty()) {
            log(Level::Warning, "Dropped what the application may not set: %s: %s",
                r.dropped.c_str(), escape(c.request_line()).c_str());
        }
        c.pass.bodyless = c.pass.bodyless || r.status == 204 || r.status == 304;
        c.left = c.pass.bodyless ? -1 : r.length;
        c.chunked = !c.pass.bodyless && c.left < 0 && c.pass.minor > 0;
        c.head = final_head(r, c.pass.minor, c.chunked);
        c.out.append(c.head, kReplyMemory);
        set_state(c, State::Reply);
        reply_body(c, piece.substr(end + 2));
    }

    void reply_body(Connection& c, string_view piece) {
        if (c.pass.bodyless) { return; }
        if (c.left >= 0) {
            const string_view fits = piece.substr(0, static_cast<size_t>(c.left));
            c.left -= static_cast<int64_t>(fits.size());
            if (fits.size() < piece.size() && !std::exchange(c.too_long, true)) {
                log(Level::Error, "The response is longer than its Content-Length: %s",
                    escape(c.request_line()).c_str());
            }
            piece = fits;
        }
        if (piece.empty()) { return; }
        c.body_bytes += static_cast<int64_t>(piece.size());
        const size_t limit = reply_memory_ < kWorkerMemory ? kReplyMemory : 0;
        if (c.chunked) {
            char size[20];
            std::snprintf(size, sizeof size, "%zx\r\n", piece.size());
            c.out.append(size, limit);
        }
        c.out.append(piece, limit);
        if (c.chunked) { c.out.append("\r\n", limit); }
    }

    /// The runner has said all it has to say about this request, or that it is ready.
    void end_reply(bool good) {
        if (runner_.phase == Phase::Booting) {
            runner_.phase = Phase::Idle;
            if (!std::exchange(booted_, true)) {
                notify();
                (void)write_some(arbiter_, string_view("", 1));
            }
            return next_request();
        }
        runner_.answered = true;
        runner_.tell_gone = false;
        if (good) { failures_ = 0; }
        if (Connection* c = std::exchange(runner_.current, nullptr)) {
            const bool cut = good && c->left > 0;
            if (!good || cut) {
                log(Level::Error, "%s: %s", cut ? "The response is shorter than its Content-Length"
                                                : "Error handling request",
                    escape(c->request_line()).c_str());
            }
            if (good && c->chunked) { c->out.append("0\r\n\r\n", kReplyMemory); }
            if (runner_.body.size() > 0) { runner_.request = c->request_line(); }
            become_idle();  // the runner has its next request before this client its response
            return end_response(*c, good && !cut, {500, "the application failed"});
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

    /// Nobody waits for the response any more: the runner is told so.
    void abandon(Connection& c) {
        runner_.request = c.request_line();
        runner_.current = nullptr;
        runner_.tell_gone = true;
        feed_runner();
    }

    /// The slot is free once the response has ended and the request has gone out entirely.
    void become_idle() {
        if (runner_.phase != Phase::Busy || !runner_.to || !runner_.answered ||
            !runner_.outgoing.empty() || runner_.body.size() > 0) {
            return;
        }
        runner_.phase = Phase::Idle;
        runner_.deadline = Time::max();
        next_request();
    }

    /// What came late waits here, what has waited for longer in the queue: that goes first.
    void next_request() {
        if (ready_.empty()) { return; }
        Connection* c = take_from_queue();
        dispatch(c != nullptr ? *c : *ready_.front());
    }

    /// A pipe broke: waitpid() will tell why, or the runner has no business any more.
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

    /// No frame for `timeout` seconds. faulthandler prints the stack at SIGABRT.
    void hung_app() {
        if (stalled()) { return extend_deadline(); }  // the client is slow, not the application
        Connection* c = std::exchange(runner_.current, nullptr);
        log(Level::Critical, "WORKER TIMEOUT (pid:%d): no answer for %s s: %s", runner_.pid,
            get<&Config::timeout>(config_).c_str(),
            escape(c != nullptr ? c->request_line() : runner_.request).c_str());
        signal_runner(SIGABRT);
        kill_runner_after(kKillDelay);
        lose_runner();
        if (c != nullptr) { end_response(*c, false, {504, "the application did not answer"}); }
    }

    /// The runner has ended: its request is answered, and another runner will start.
    void reap_runner() {
        int status = 0;
        if (runner_.pid < 0 || ::waitpid(runner_.pid, &status, WNOHANG) != runner_.pid) { return; }
        runner_.to.reset();
        while (runner_.from && read_runner()) {}  // what it still said counts
        Connection* c = std::exchange(runner_.current, nullptr);
        const Runner gone = std::exchange(runner_, Runner{});
        if (WIFSIGNALED(status)) { ::kill(-gone.pid, SIGKILL); }
        if (has_work() || (status != 0 && gone.signal == 0)) {
            log(Level::Error, "Runner (pid:%d) %s%s%s", gone.pid, exit_text(status).c_str(),
                gone.signal != 0 ? ", sent by this server" : "",
                c != nullptr ? (": " + escape(c->request_line())).c_str() : "");
        }
        if (c != nullptr) { end_response(*c, false, {502, "the runner died"}); }
        if (!has_work()) { return; }
        const int code = WIFEXITED(status) ? WEXITSTATUS(status) : 0;
        if (!booted_) {
            status_ = code == kWorkerBootError || code >= 126 ? kWorkerBootError : kAppLoadError;
        }
        const int delay = failures_ == 0 ? 0 : std::min(30, 1 << std::min(failures_ - 1, 5));
        if (++failures_ > 1) { log(Level::Warning, "The next runner starts in %d s", delay); }
        restart_at_ = now_ + seconds(delay);
        next_tick_ = std::min(next_tick_, restart_at_);
    }

    Error boot_runner() {
        restart_at_ = now_ + 1s;  // should it fail
        if (Error error = start_runner(config_, runner_, files_)) { return error; }
        restart_at_ = Time::max();
        max_fd_ = std::max({max_fd_, runner_.to.get(), runner_.from.get()});
        return {};
    }

    const Config& config_;
    std::vector<Listener>& listeners_;
    const Pair& queue_;  // first is sent into, second received from
    const Fd& tmp_;      // the heartbeat file
    const Fd arbiter_;
    const pid_t arbiter_pid_;
    const rlim_t files_;
    Runner runner_;
    std::unique_ptr<Connection> connections_[FD_SETSIZE];  // by descriptor
    std::deque<Connection*> ready_;                        // complete, waiting here for a runner
    int connected_ = 0, failures_ = 0, status_ = 0, max_fd_ = 0;
    bool booted_ = false, stopping_ = false, quick_ = false, spinner_ = false;
    int ahead_ = 0;  // connections accepted since the ready queue was last looked at
    bool draining_ = false, dismissed_ = false;  // all workers stop; the last runner was told to go
    size_t reply_memory_ = 0;
    fd_set reads_, writes_;  // what select() watches for the connections
    Time now_ = Clock::now(), next_tick_ = now_, next_notify_ = now_, accept_again_ = now_;
    Time next_pass_ = Time::max(), restart_at_ = Time::max();
    char buffer_[kMaxMessage];
};

// ============================================================================
//  10. Arbiter: the master process
//
//  It never reads a request. Its loop sleeps on the self-pipe, handles one signal at a time, and
//  then makes the workers what they should be; nothing in it waits for a worker.
// ============================================================================
struct WorkerInfo {
    pid_t pid;
    int generation;              // of the reload it belongs to
    Fd tmp;                      // its heartbeat file
    Time spawned, last_change;   // when, on our clock, we saw the heartbeat change
    struct timespec last_update {};
    Time stop_by = Time::max();  // SIGKILL, once it has been told to stop
    bool booted = false, stopping = false, aborted = false;
};

class Arbiter {
public:
    Arbiter(const Config& config, std::vector<Listener> listeners, rlim_t files)
        : config_(config), listeners_(std::move(listeners)), files_(files),
          num_workers_(config.workers) {}

    /// Runs the server until it is told to stop; returns the exit status.
    int run() {
        if (Error error = start()) {
            log(Level::Critical, "%s", error.text.c_str());
            return error.code;
        }
        while (!stopping_ || !workers_.empty()) {
            manage_workers();
            fd_set reads, writes;
            FD_ZERO(&reads);
            FD_ZERO(&writes);
            FD_SET(g_self_pipe.first.get(), &reads);
            Time until = now_ + (stopping_ || aborting_ ? 100ms : 1000ms);
            if (spawn_again_ > now_) { until = std::min(until, spawn_again_); }
            wait_ready(g_self_pipe.first.get(), reads, writes, until);
            const Time before = std::exchange(now_, Clock::now());
            if (now_ > before + 1500ms) {  // we were stopped: silence of the workers proves nothing
                for (WorkerInfo& worker : workers_) { worker.last_change = now_; }
            }
            for (int number; (number = next_signal()) >= 0;) { handle_signal(number); }
            reap_workers();
            murder_workers();
        }
        unlink_sockets(listeners_);
        log(Level::Info, "Shutting down: Master");
        if (!reason_.empty()) { log(Level::Error, "Reason: %s", reason_.c_str()); }
        return status_;
    }

private:
    Error start() {
        Strings texts;
        for (const Listener& each : listeners_) { texts.push_back(each.text); }
        log(Level::Info, "Starting server %s", kVersion);
        log(Level::Info, "Listening at: %s (%d)", join(texts).c_str(), ::getpid());
        log(Level::Info, "Using worker: %s", config_.worker_class.c_str());
        int fds[2];
        if (::socketpair(AF_UNIX, SOCK_DGRAM, 0, fds) < 0) { return os_error("no ready queue"); }
        queue_ = {Fd(fds[0]), Fd(fds[1])};
        for (const int fd : fds) { set_flags(fd, true); }
        for (const int number : {SIGUSR1, SIGUSR2, SIGWINCH}) { set_signal(number, SIG_IGN); }
        return open_self_pipe({SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTTIN, SIGTTOU, SIGCHLD});
    }

    void handle_signal(int number) {
        static constexpr std::pair<int, const char*> kNames[] = {
            {SIGHUP, "hup"}, {SIGINT, "int"}, {SIGQUIT, "quit"}, {SIGTERM, "term"},
            {SIGTTIN, "ttin"}, {SIGTTOU, "ttou"}};
        for (const auto& [each, name] : kNames) {
            if (each == number) { log(Level::Info, "Handling signal: %s", name); }
        }
        if (number == SIGHUP && !stopping_) { handle_hup(); }
        if (number == SIGTERM && !stopping_) { halt(SIGTERM); }
        if (number == SIGINT || number == SIGQUIT) { halt(SIGQUIT); }
        if (number == SIGTTIN) { ++num_workers_; }
        if (number == SIGTTOU) { num_workers_ = std::max(1, num_workers_ - 1); }
    }

    /// SIGTERM: workers finish what they have. SIGQUIT, also later: they leave at once.
    void halt(int number) {
        stopping_ = true;
        for (Listener& each : listeners_) { each.fd.reset(); }
        for (WorkerInfo& worker : workers_) {
            stop_worker(worker, number == SIGTERM ? SIGUSR2 : number);
        }
    }

    void stop_worker(WorkerInfo& worker, int number) const {
        const Clock::duration quick = 700ms, graceful = config_.graceful_timeout;
        worker.stop_by = std::min(worker.stop_by, now_ + (number == SIGQUIT ? quick : graceful));
        worker.stopping = true;
        ::kill(worker.pid, number);
    }

    /// Reload: one worker of a new generation, the canary. When it is ready the rest follow, and
    /// then the old ones go (read_heartbeats, manage_workers); if it fails they stay.
    void handle_hup() {
        log(Level::Info, "Hang up: Master");
        if (Error error = open_logs(config_)) { log(Level::Error, "%s", error.text.c_str()); }
        for (WorkerInfo& worker : workers_) {
            if (worker.pid == canary_) { stop_worker(worker, SIGTERM); }
        }
        canary_ = spawn_worker(++newest_);
    }

    /// Looks at the heartbeat files: who lives, who is ready. Their ctime is only ever compared
    /// with itself: setting the wall clock must not kill anyone.
    void read_heartbeats() {
        for (WorkerInfo& worker : workers_) {
            struct stat info {};
            ::fstat(worker.tmp.get(), &info);
            if (std::memcmp(&info.st_ctim, &worker.last_update, sizeof info.st_ctim) != 0) {
                worker.last_update = info.st_ctim;
                worker.last_change = now_;
            }
            if (worker.booted || (info.st_mode & 2) == 0) { continue; }
            worker.booted = ever_booted_ = true;
            if (worker.pid != canary_) { continue; }
            generation_ = worker.generation;
            canary_ = -1;
        }
    }

    /// Ends workers that have not beaten for `timeout`: SIGABRT, then SIGKILL.
    void murder_workers() {
        read_heartbeats();
        aborting_ = false;
        for (WorkerInfo& worker : workers_) {
            if (now_ >= worker.stop_by) { ::kill(worker.pid, SIGKILL); }
            if (config_.timeout == 0s || now_ < worker.last_change + config_.timeout) { continue; }
            aborting_ = true;
            worker.last_change = now_ - config_.timeout + kKillDelay;
            if (std::exchange(worker.aborted, true)) {
                ::kill(worker.pid, SIGKILL);
            } else {
                log(Level::Critical, "WORKER TIMEOUT (pid:%d)", worker.pid);
                ::kill(worker.pid, SIGABRT);
            }
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
            if (status != 0) {
                log(Level::Error, "Worker (pid:%d) %s", pid, exit_text(status).c_str());
            }
            if (!stopping_) { worker_lost(worker, WIFEXITED(status) ? WEXITSTATUS(status) : 0); }
        }
    }

    /// Halts if no worker could ever boot; else sees to it that a crash loop does not spin.
    void worker_lost(const WorkerInfo& worker, int code) {
        if (!ever_booted_ && (code == kWorkerBootError || code == kAppLoadError)) {
            status_ = code;
            reason_ = code == kAppLoadError ? "App failed to load." : "Worker failed to boot.";
            return halt(SIGQUIT);
        }
        if (worker.pid == canary_) {
            canary_ = -1;
            log(Level::Error, "Reload failed: the old workers go on");
            return;
        }
        if (worker.stopping) { return; }
        failures_ = worker.booted && now_ > worker.spawned + 5s ? 0 : failures_ + 1;
        const int delay = failures_ < 2 ? 0 : std::min(30, 1 << std::min(failures_ - 2, 5));
        if (delay > 0) { log(Level::Warning, "Workers fail: the next starts in %d s", delay); }
        spawn_again_ = now_ + seconds(delay);
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
        while (alive < num_workers_ && now_ >= spawn_again_ && spawn_worker(generation_) > 0) {
            ++alive;
        }
        for (WorkerInfo& worker : workers_) {  // the oldest first
            const bool old = worker.generation < generation_ && ready >= num_workers_;
            const bool surplus = worker.generation == generation_ && alive > num_workers_;
            if (worker.stopping || !(old || surplus)) { continue; }
            stop_worker(worker, SIGTERM);
            alive -= surplus ? 1 : 0;
        }
    }

    /// Forks one worker; its pid, or -1. The child leaves by _exit: nothing of the arbiter's runs.
    pid_t spawn_worker(int generation) {
        Result<Fd> tmp = make_temp_file(config_.worker_tmp_dir);
        const pid_t arbiter = ::getpid();
        block_signals(true);
        const pid_t pid = tmp.error ? -1 : ::fork();
        if (pid == 0) {
            workers_.clear();
            const auto worker =
                std::make_unique<Worker>(config_, listeners_, queue_, tmp.value,
                                         std::move(g_self_pipe.second), arbiter, files_);
            ::_exit(worker->run());
        }
        block_signals(false);
        if (pid < 0) {
            log(Level::Error, "cannot start a worker: %s",
                tmp.error ? tmp.error.text.c_str() : std::strerror(errno));
            spawn_again_ = now_ + 1s;
            return -1;
        }
        workers_.push_back({pid, generation, std::move(tmp.value), now_, now_});
        return pid;
    }

    const Config& config_;
    std::vector<Listener> listeners_;
    const rlim_t files_;
    Pair queue_;
    std::vector<WorkerInfo> workers_;
    int num_workers_;
    int generation_ = 0, newest_ = 0;  // the one that serves; the one last tried
    pid_t canary_ = -1;
    int failures_ = 0, status_ = 0;
    bool stopping_ = false, ever_booted_ = false, aborting_ = false;
    Time now_ = Clock::now(), spawn_again_ = now_;
    string reason_;
};

// ============================================================================
//  12. main
// ============================================================================

/// Puts the settings into force: directory, environment, descriptors, logs. `files` gets the
/// soft limit on descriptors as it was, for the application.
Error apply(Config& config, rlim_t& files) {
    if (!config.chdir.empty() && ::chdir(config.chdir.c_str()) < 0) {
        return os_error("cannot change to " + config.chdir);
    }
    for (const string& pair : config.raw_env) {
        string_view value = pair;
        const string name(cut(value, '='));
        ::setenv(name.c_str(), value.data(), 1);
    }
    struct rlimit limit {};
    ::getrlimit(RLIMIT_NOFILE, &limit);
    files = std::exchange(limit.rlim_cur, std::min<rlim_t>(limit.rlim_max, 4 * FD_SETSIZE));
    ::setrlimit(RLIMIT_NOFILE, &limit);
    const int others = 20 + static_cast<int>(config.bind.size());  // that select() sees
    int most = static_cast<int>(std::min<rlim_t>(limit.rlim_cur, FD_SETSIZE)) - others;
    if (limit.rlim_cur < 2 * FD_SETSIZE) { most /= 2; }  // temporary files come out of the same few
    if (config.worker_tmp_dir.empty()) {  // a disk that stalls must not look like a dead worker
        const bool shm = ::access("/dev/shm", W_OK | X_OK) == 0;
        config.worker_tmp_dir = shm ? "/dev/shm" : temp_dir();
    }
    if (Error error = make_temp_file(config.worker_tmp_dir).error) { return error; }
    if (Error error = open_logs(config)) { return error; }
    if (config.worker_connections > most) {
        log(Level::Warning, "--worker-connections lowered from %d to %d, which is what fits",
            std::exchange(config.worker_connections, most), most);
    }
    return {};
}

/// --check-config: does the application load?
int check_app(const Config& config, rlim_t files) {
    Runner runner;
    if (start_runner(config, runner, files)) { return kWorkerBootError; }
    ::fcntl(runner.from.get(), F_SETFL, 0);  // blocking
    char byte = 0;
    const bool loaded = read_some(runner.from, &byte, 1) == 1;
    runner.to.reset();
    int status = 0;
    retry([&] { return ::waitpid(runner.pid, &status, 0); });
    const int code = WIFEXITED(status) ? WEXITSTATUS(status) : 0;
    return loaded ? 0 : code == kWorkerBootError ? code : kAppLoadError;
}

Error bind_all(const Config& config, std::vector<Listener>& listeners) {
    std::vector<Address> addresses;
    for (const string& text : config.bind) {
        Result<Address> address = parse_address(text);
        if (address.error) { return address.error; }
        addresses.push_back(std::move(address.value));
    }
    for (const Address& address : addresses) {
        if (config.check_config) { break; }
        Result<Listener> listener = bind_address(address, config.backlog);
        if (listener.error) { return listener.error; }
        listeners.push_back(std::move(listener.value));
    }
    return {};
}

}  // namespace

int main(int argc, char** argv) {
    for (int fd = 0; fd <= STDERR_FILENO;) {  // a socket must not become a standard descriptor
        fd = ::open("/dev/null", O_RDWR | (fd > 0 ? O_CLOEXEC : 0));
        if (fd > STDERR_FILENO) { ::close(fd); }
    }
    set_signal(SIGPIPE, SIG_IGN);
    g_log.error_file.reset(::fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, 3));
    Config config;
    std::vector<Listener> listeners;
    rlim_t files = 0;
    Error error = parse_command_line({argv + std::min(argc, 1), argv + argc}, config);
    if (!error && config.help) { return print_help(), 0; }
    if (!error && config.version) { return std::printf("server %s\n", kVersion), 0; }
    if (!error && config.print_config) { return print_config(config), 0; }
    if (!error) { error = apply(config, files); }
    if (!error) { error = bind_all(config, listeners); }
    if (error) {
        unlink_sockets(listeners);
        return std::fprintf(stderr, "Error: %s\n", error.text.c_str()), error.code;
    }
    if (config.check_config) { return check_app(config, files); }
    return Arbiter(config, std::move(listeners), files).run();
}
