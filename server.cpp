// server.cpp: a pre-fork WSGI server for POSIX systems, in one C++17 file.
//
//   make && ./server                       serves app_example.py on http://127.0.0.1:8000
//   ./server mysite.wsgi -w 4 -b :8080     serves a Flask or Django project
//
//   arbiter (master)        binds, forks, watches, reloads; never reads a request
//    ├─ worker 1 (C++)      accepts, buffers, parses, answers, beats its heart
//    │   └─ runner          python3, started once, holds the WSGI application
//    └─ worker N …
//
// The path of a request, in order of time:
//   accept_client → read_client → parse → ready ──────────────┬→ dispatch → hand_over
//                       ready queue: pass_on → take_from_queue ┘     (runner: Slot.serve)
//   finish ← flush ← end_reply ← reply_body ← take_reply ← read_runner ←──────┘
//
// Slow clients do not hold up the application: the worker reads the whole request without blocking,
// waits for an idle runner (its own or, through the ready queue, another worker's), and takes the
// response as fast as the application makes it, however slowly the client reads.
//
//   Signal      arbiter                                      worker
//   TERM        graceful stop: USR2 to all workers           serve what was accepted, then leave
//   USR1        reopen the logs                              the same; tell the runner, once idle
//   USR2        upgrade: a new master beside this one        as TERM, and serve the ready queue
//   INT, QUIT   stop within a second                         leave at once
//   HUP         reload: new workers, then TERM to the old    ignored
//   TTIN, TTOU  add a worker, remove a worker                ignored
//   WINCH       with --daemon: no workers until HUP          after USR2: as after TERM
//   CHLD        reap_workers                                 reap_runners
//
// Contents: grep -E '^//  [0-9]|^    // --- ' server.cpp
#include <arpa/inet.h>
#include <fcntl.h>
#include <grp.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pwd.h>
#include <sched.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>
#ifdef __linux__
#include <malloc.h>
#include <sys/prctl.h>
#endif
#ifdef __APPLE__
#define st_mtim st_mtimespec  // POSIX has the names on the left
#define st_ctim st_ctimespec
#define initgroups(user, gid) initgroups(user, static_cast<int>(gid))
#endif

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <list>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

static_assert(sizeof(off_t) >= 8, "for large files: -D_FILE_OFFSET_BITS=64, as in the Makefile");

namespace {

// ============================================================================
//  1. Small tools: descriptors, text and numbers, Spool (bytes in memory, then in a file), signals
//
//  Errors are values, not exceptions: one thrown in a forked child would unwind through frames of
//  its parent, and in a select loop most failures are routine and end one connection. Deadlines
//  use the steady clock, which nobody can set; the wall clock is for people.
// ============================================================================
using std::string, std::string_view, std::to_string;
using std::chrono::microseconds, std::chrono::seconds;
using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;
using Time = Clock::time_point;
using Strings = std::vector<string>;

constexpr const char* kVersion = "0.1.0";
constexpr int kWorkerBootError = 3, kAppLoadError = 4;  // exit statuses with gunicorn's meanings
constexpr size_t kMaxShown = 8192;                      // bytes of one value in a log
constexpr size_t kPiece = 65536;  // bytes of one read(), and of a request body in memory

struct Error {
    int code = 0;  // an exit status or an HTTP status; 0: no error
    string text;
    explicit operator bool() const { return code != 0; }
};

/// A start-up error (exit status 1): `what`, and the text of errno.
Error os_error(const string& what) { return {1, what + ": " + std::strerror(errno)}; }

/// Owns one descriptor. close() is never retried: Linux frees the number even on EINTR.
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

bool would_block() { return errno == EAGAIN || errno == EWOULDBLOCK; }

ssize_t write_some(const Fd& fd, string_view data) {
    return ::write(fd.get(), data.data(), data.size());
}

/// Writes up to four parts with one system call.
ssize_t write_parts(const Fd& fd, string_view first, std::initializer_list<string_view> others) {
    struct iovec parts[4] = {{const_cast<char*>(first.data()), first.size()}};
    int count = 1;
    for (const string_view part : others) {
        if (part.empty()) { continue; }
        parts[count++] = {const_cast<char*>(part.data()), part.size()};
    }
    if (count == 1) { return write_some(fd, first); }
    return ::writev(fd.get(), parts, count);
}

/// Writes everything to a blocking descriptor; false, with errno, if that fails.
bool write_all(const Fd& fd, string_view data) {
    while (!data.empty()) {
        const ssize_t n = write_some(fd, data);
        if (n < 0) { return false; }
        data.remove_prefix(static_cast<size_t>(n));
    }
    return true;
}

/// Sets close-on-exec and perhaps non-blocking. There is one thread: no fork() can come before it.
void set_flags(int fd, bool nonblocking) {
    ::fcntl(fd, F_SETFD, FD_CLOEXEC);
    if (nonblocking) { ::fcntl(fd, F_SETFL, ::fcntl(fd, F_GETFL) | O_NONBLOCK); }
}

/// Moves a descriptor that select() never watches to FD_SETSIZE or above, if the limit allows.
Fd raise_fd(Fd fd) {
    const int high = fd ? ::fcntl(fd.get(), F_DUPFD_CLOEXEC, FD_SETSIZE) : -1;
    return high < 0 ? std::move(fd) : Fd(high);
}

/// Sets the soft limit on descriptors, at most to the hard limit. Returns the old one.
rlim_t set_soft_limit(rlim_t wanted) {
    struct rlimit limit = {};
    ::getrlimit(RLIMIT_NOFILE, &limit);
    const rlim_t before = std::exchange(limit.rlim_cur, std::min(limit.rlim_max, wanted));
    ::setrlimit(RLIMIT_NOFILE, &limit);
    return before;
}

using Pair = std::pair<Fd, Fd>;  // a pipe: first is its reading end, second its writing end

Error make_pipe(Pair& made, bool nonblocking = false) {
    int fds[2];
    if (::pipe(fds) < 0) { return os_error("cannot make a pipe"); }
    for (const int fd : fds) { set_flags(fd, nonblocking); }
    made = {Fd(fds[0]), Fd(fds[1])};
    return {};
}

/// Resizes a pipe if the system can. Returns how many bytes an empty one is sure to take in one
/// write: PIPE_BUF by POSIX, on Linux at least half its size.
size_t resize_pipe([[maybe_unused]] const Fd& fd, [[maybe_unused]] int bytes) {
#ifdef F_SETPIPE_SZ
    (void)::fcntl(fd.get(), F_SETPIPE_SZ, bytes);
    const int size = ::fcntl(fd.get(), F_GETPIPE_SZ);
    return static_cast<size_t>(std::max(size / 2, PIPE_BUF));
#else
    return PIPE_BUF;
#endif
}

string environment(const char* name) {
    const char* value = std::getenv(name);
    return value != nullptr ? value : "";
}

/// The current directory under the shell's name for it, with its symbolic links: one of them
/// ("current") may point to another release when the server reloads.
string current_directory() {
    char here[PATH_MAX], named[PATH_MAX];
    const string shell = environment("PWD");
    if (::realpath(".", here) == nullptr) { return "/"; }
    const bool known = shell.substr(0, 1) == "/" && ::realpath(shell.c_str(), named) != nullptr;
    return known && string_view(here) == named ? shell : here;
}

string absolute(const string& directory, const string& path) {
    return path.empty() ? directory : path.front() == '/' ? path : directory + "/" + path;
}

string temp_dir() { return environment("TMPDIR").empty() ? "/tmp" : environment("TMPDIR"); }

/// Makes a file and unlinks it at once: closing its last descriptor frees it, even on a crash.
Error make_temp_file(const string& dir, Fd& made) {
    string path = dir + "/server-XXXXXX";
    Fd fd(::mkstemp(path.data()));
    if (!fd) { return os_error("cannot make a temporary file in " + dir); }
    ::unlink(path.c_str());
    set_flags(fd.get(), false);
    made = raise_fd(std::move(fd));
    return {};
}

/// The first element for which `test` holds; null if there is none.
template <typename Range, typename Test>
auto find(Range&& range, Test test) -> decltype(&*std::begin(range)) {
    for (auto& each : range) {
        if (test(each)) { return &each; }
    }
    return nullptr;
}

string in_quotes(string_view text) { return "'" + string(text) + "'"; }

constexpr bool is_digit(char c) { return c >= '0' && c <= '9'; }
constexpr char lower(char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c; }

/// Field names, codings and schemes are case-insensitive (RFC 9110 section 5.1).
bool same_name(string_view a, string_view b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                      [](char x, char y) { return lower(x) == lower(y); });
}

/// Strips optional whitespace from both ends (OWS, RFC 9110 section 5.6.3).
string_view trim(string_view text) {
    text.remove_prefix(std::min(text.find_first_not_of(" \t"), text.size()));
    return text.substr(0, text.find_last_not_of(" \t") + 1);
}

/// Removes the text up to the first `separator` and returns it without that; or all of it.
string_view cut(string_view& text, char separator) {
    const string_view part = text.substr(0, text.find(separator));
    text.remove_prefix(std::min(part.size() + 1, text.size()));
    return part;
}

/// Empties a string and frees its memory, which clear() would keep.
void discard(string& text) { string().swap(text); }

/// Reads digits of `base` and nothing else. False, with `number` undefined: there is no digit, or
/// anything else, or the number does not fit into 63 bits.
bool parse_number(string_view text, int64_t& number, int base = 10) {
    number = 0;
    for (const char c : text) {
        const int digit = is_digit(c) ? c - '0' : lower(c) >= 'a' ? lower(c) - 'a' + 10 : base;
        if (digit >= base || number > (INT64_MAX - digit) / base) { return false; }
        number = number * base + digit;
    }
    return !text.empty();
}

/// An IP address and the length of its prefix.
struct Network {
    bool v6 = false;
    int64_t bits = 0;
    unsigned char address[17] = {};  // not 16: for a /128 is_listed() reads one byte more
};

/// Reads 10.0.0.1, 10.0.0.0/8, ::1 and the like.
bool parse_network(string_view text, Network& network) {
    network.v6 = text.find(':') != string::npos;
    const int64_t most = network.bits = network.v6 ? 128 : 32;
    const bool whole = text.find('/') == string::npos;
    const string address(cut(text, '/'));
    return address.find('\0') == string::npos &&  // inet_pton() would ignore what follows it
           ::inet_pton(network.v6 ? AF_INET6 : AF_INET, address.c_str(), network.address) == 1 &&
           (whole || (parse_number(text, network.bits) && network.bits <= most));
}

/// A file's time from stat(2) as one number, for comparisons.
int64_t nanoseconds(const struct timespec& t) {
    return int64_t{t.tv_sec} * 1'000'000'000 + t.tv_nsec;
}

/// Makes a client's bytes harmless in a log: escapes quotes, backslashes, control characters and
/// all that is not ASCII, and cuts off after kMaxShown bytes.
string escape(string_view text) {
    static constexpr char kHex[] = "0123456789abcdef";
    string out;
    for (const char c : text.substr(0, kMaxShown)) {
        const unsigned byte = static_cast<unsigned char>(c);
        const bool plain = c >= ' ' && c < 0x7f;
        if (!plain || c == '"' || c == '\\') { out += '\\'; }
        plain ? out += c : ((out += 'x') += kHex[byte / 16]) += kHex[byte % 16];
    }
    return out;
}

/// A queue of bytes: the oldest and the newest are in memory; once a limit is passed, those
/// between them are in an unlinked temporary file.
class Spool {
public:
    /// If memory would hold more than `limit` bytes, the newest go to the file; if that fails (the
    /// disk is full), they stay in memory all the same, and failed() says so.
    void append(string_view data, size_t limit) {
        back_ += data;
        failed_ = memory() > limit && !store();
    }

    /// The next bytes; empty only if there are no more. Valid until the next call.
    string_view front() {
        if (offset_ == front_.size()) { refill(); }
        return string_view(front_).substr(offset_);
    }

    void pop(size_t n) { offset_ += n; }
    void prepend(string_view data) { (void)front(), front_.insert(offset_, data); }
    bool failed() const { return failed_; }
    bool full() const { return size() > 0 && (failed_ || file_end_ >= int64_t{1} << 30); }
    size_t memory() const { return front_.size() - offset_ + back_.size(); }
    size_t allocated() const { return front_.capacity() + back_.capacity(); }
    int64_t stored() const { return file_end_ - file_begin_; }
    int64_t size() const { return stored() + static_cast<int64_t>(memory()); }
    string_view newest() const { return back_; }
    const Fd& file() const { return file_; }
    void adopt_file(Fd file, int64_t bytes) { file_ = std::move(file), file_end_ = bytes; }

private:
    bool store() {  // all or nothing: after a short write file_end_ is what it was
        if (!file_ && make_temp_file(temp_dir(), file_)) { return false; }
        const bool there = ::lseek(file_.get(), file_end_, SEEK_SET) >= 0;
        if (!there || !write_all(file_, back_)) { return false; }
        file_end_ += static_cast<int64_t>(back_.size());
        discard(back_);
        return true;
    }

    void refill() {
        discard(front_);
        offset_ = 0;
        if (stored() == 0) {
            file_.reset();
            file_begin_ = file_end_ = 0;
            failed_ = false;
            return front_.swap(back_);
        }
        front_.resize(static_cast<size_t>(std::min<int64_t>(kPiece, stored())));
        const ssize_t n = ::pread(file_.get(), front_.data(), front_.size(), file_begin_);
        if (n <= 0) { std::abort(); }  // bytes are lost: to go on would be to corrupt a body
        front_.resize(static_cast<size_t>(n));
        file_begin_ += n;
    }

    string front_, back_;
    size_t offset_ = 0;  // bytes of front_ that have been taken
    Fd file_;
    int64_t file_begin_ = 0, file_end_ = 0;
    bool failed_ = false;
};

/// How long to wait before a process is restarted, after so many failures in a row.
seconds backoff(int failures) {
    return seconds(failures < 1 ? 0 : std::min(30, 1 << std::min(failures - 1, 5)));
}

// The handler writes each signal to a pipe that select() watches. A flag could be set between the
// test of it and select(), which would then sleep in spite of it.
Pair g_self_pipe;

void on_signal(int number) {
    const int saved = errno;
    const char byte = static_cast<char>(number);
    (void)!::write(g_self_pipe.second.get(), &byte, 1);
    errno = saved;
}

void set_signals(std::initializer_list<int> numbers, void (*handler)(int)) {
    struct sigaction action = {};
    action.sa_handler = handler;
    action.sa_flags = SA_RESTART;  // then only select() fails with EINTR: signal(7)
    sigfillset(&action.sa_mask);   // of two pending, Linux delivers the lower: USR2 before TERM
    for (const int number : numbers) { ::sigaction(number, &action, nullptr); }
}

void block_signals(bool block) {
    sigset_t set;
    block ? sigfillset(&set) : sigemptyset(&set);
    ::sigprocmask(SIG_SETMASK, &set, nullptr);
}

/// Takes the next signal from the self-pipe; -1 if there is none.
int next_signal() {
    char byte;
    return ::read(g_self_pipe.first.get(), &byte, 1) == 1 ? byte : -1;
}

/// select() with a deadline. After EINTR the sets are undefined, hence emptied here.
void wait_ready(int max_fd, fd_set& reads, fd_set& writes, Time until) {
    const int64_t left = std::chrono::ceil<microseconds>(until - Clock::now()).count();
    const int64_t us = std::clamp<int64_t>(left, 0, 3600'000'000);
    struct timeval timeout = {time_t(us / 1000000), suseconds_t(us % 1000000)};
    if (::select(max_fd + 1, &reads, &writes, nullptr, &timeout) < 0) { reads = writes = {}; }
}

/// Whether there is something to read, or a client to accept; waits for it until `until`, if given.
bool is_ready(const Fd& fd, Time until = Time{}) {
    fd_set reads{}, writes{};
    FD_SET(fd.get(), &reads);
    wait_ready(fd.get(), reads, writes, until);
    return FD_ISSET(fd.get(), &reads);
}

// ============================================================================
//  2. Settings
//
//  A default is written once, in Config; an option once, in kOptions. Parsing, --help and
//  --print-config all walk that table. Names and meanings are gunicorn's.
// ============================================================================
struct Config {
    string app = "app_example:app", worker_class = "sync";
    int workers = 2, threads = 1, backlog = 2048, worker_connections = 1000;
    int max_requests = 0, max_requests_jitter = 0;
    int limit_request_line = 4094, limit_request_fields = 100, limit_request_field_size = 8190;
    int64_t limit_request_body = int64_t{1} << 30;
    seconds timeout{30}, graceful_timeout{30}, header_timeout{10};
    string chdir, worker_tmp_dir, accesslog, errorlog = "-", loglevel = "info";
    string access_log_format = "%(h)s %(l)s %(u)s %(t)s \"%(r)s\" %(s)s %(b)s \"%(f)s\" \"%(a)s\"";
    Strings bind, pythonpath, raw_env;
    string python = "python3", runner;
    string forwarded_allow_ips = "127.0.0.1,::1", proxy_allow_from = "127.0.0.1,::1";
    bool proxy_protocol = false;
    string pidfile, user, group, umask = "0000", proc_name;
    bool reload = false;
    Strings reload_extra_files;
    uid_t uid = 0;  // of --user and --group, by resolve_user()
    gid_t gid = 0;
    rlim_t soft_limit = 0;  // on descriptors before we raised it: what the application gets
    int pipes = 8;          // request pipes of each slot
    string sockets;         // inherited: FD:BOUND_AT: of each; BOUND_AT 0: not ours to unlink
    Strings argv;           // for an upgrade: the command line, and the directory it was given in
    string directory;
    pid_t old_master = 0;   // the master that this one is to replace; 0: none
    char* title = nullptr;  // the memory that ps shows
    size_t title_size = 0;
    bool daemon = false, detached = false;  // detached: is in the background already
    bool check_config = false, print_config = false, version = false, help = false;
};

string to_string(const string& text) { return text; }
string to_string(bool flag) { return flag ? "yes" : "no"; }
string to_string(seconds time) { return to_string(time.count()); }

string to_string(const Strings& parts) {
    string out;
    for (const string& part : parts) { out += (out.empty() ? "" : ",") + part; }
    return out;
}

template <auto Member>
string get(const Config& config) {
    return to_string(config.*Member);
}

/// Reads a whole number. Error code 2: it is not one; 1: it is not in `low` to `high`.
Error read_number(string_view text, int64_t low, int64_t high, int64_t& number) {
    const string_view digits = text.substr(text.substr(0, 1) == "-" ? 1 : 0);
    if (digits.empty() || find(digits, [](char c) { return !is_digit(c); })) {
        return {2, in_quotes(text) + " is not a whole number"};
    }
    if (parse_number(text, number) && number >= low && number <= high) { return {}; }
    return {1, string(text) + " is not in " + to_string(low) + " to " + to_string(high)};
}

template <auto Member>
using Type = std::decay_t<decltype(std::declval<Config>().*Member)>;

/// Sets a string or a number, appends to a list, or turns a flag on.
template <auto Member>
void set(Config& config, [[maybe_unused]] string_view text, [[maybe_unused]] int64_t number) {
    using T = Type<Member>;
    if constexpr (std::is_same_v<T, string>) {
        config.*Member = text;
    } else if constexpr (std::is_same_v<T, Strings>) {
        (config.*Member).emplace_back(text);
    } else if constexpr (std::is_same_v<T, bool>) {
        config.*Member = true;
    } else {
        config.*Member = T(number);
    }
}

Error check_workers(string_view text) {
    int64_t number = 0;
    return text == "auto" ? Error{} : read_number(text, 1, 1000, number);
}

void set_workers(Config& config, string_view text, int64_t number) {
    const bool given = parse_number(text, number);
    if (!given) { number = std::clamp(::sysconf(_SC_NPROCESSORS_ONLN), 1L, 1000L); }
    config.workers = static_cast<int>(number);
}

constexpr const char* kLevels[] = {"DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"};
constexpr const char* kWorkerClasses[] = {"sync", "gthread"};

template <const auto& Words>
Error check_word(string_view text) {
    const auto named = [text](string_view word) { return same_name(word, text); };
    return find(Words, named) ? Error{} : Error{1, "there is no " + in_quotes(text)};
}

/// Checks a list of addresses and networks, with commas between them; * is any address.
Error check_networks(string_view list) {
    while (!list.empty()) {
        const string_view entry = trim(cut(list, ','));
        Network network;
        if (entry != "*" && !parse_network(entry, network)) {
            return {1, in_quotes(entry) + " is no address or network"};
        }
    }
    return {};
}

Error check_variable(string_view text) {
    const size_t equals = text.find('=');
    const bool good = equals != 0 && equals != string::npos;
    return good ? Error{} : Error{1, "no NAME=VALUE: " + string(text)};
}

Error check_umask(string_view text) {
    int64_t mask = 0;
    const bool good = parse_number(text, mask, 8) && mask <= 0777;
    return good ? Error{} : Error{1, in_quotes(text) + " is no file mode mask"};
}

struct Option {
    const char* text;  // "-x, --name VALUE: what it does"; the letter and the value are optional
    void (*set)(Config&, string_view, int64_t);
    string (*get)(const Config&);  // nullptr: not shown
    Error (*check)(string_view) = nullptr;
    int64_t low = 0, high = -1;  // range of a number; low > high: the option is not one

    string_view usage() const { return {text, std::strcspn(text, ":")}; }
    const char* help() const { return text + usage().size() + 2; }
    string_view name() const {
        const char* from = text + (text[1] == '-' ? 2 : 6);
        return {from, std::strcspn(from, " :")};
    }
    bool takes_value() const { return usage().back() >= 'A' && usage().back() <= 'Z'; }
};

template <auto Member, int64_t Low = 0, int64_t High = INT_MAX>
constexpr Option row(const char* text, Error (*check)(string_view) = nullptr) {
    using T = Type<Member>;
    constexpr bool is_number = std::is_trivially_copyable_v<T> && !std::is_same_v<T, bool>;
    return {text, set<Member>, get<Member>, check, Low, is_number ? High : -1};
}

using C = Config;
constexpr int64_t kYear = 31'536'000, kMiB = int64_t{1} << 20;
constexpr Option kOptions[] = {
    row<&C::bind>("-b, --bind ADDRESS: HOST:PORT, [V6]:PORT, :PORT, unix:PATH, fd://N; repeatable"),
    {"-w, --workers N: worker processes; auto: one a processor", set_workers, get<&C::workers>,
     check_workers},
    row<&C::worker_class>("-k, --worker-class NAME: sync or gthread, by --threads",
                          check_word<kWorkerClasses>),
    row<&C::threads, 1, 128>("--threads N: requests that run at a time in each worker"),
    row<&C::timeout, 0, kYear>("-t, --timeout SECONDS: end what is silent for so long; 0: never"),
    row<&C::graceful_timeout, 0, kYear>("--graceful-timeout SECONDS: to finish when stopping"),
    row<&C::header_timeout, 1, kYear>("--header-timeout SECONDS: for the head of a request"),
    row<&C::backlog, 1, 65535>("--backlog N: connections that wait to be accepted"),
    row<&C::worker_connections, 1>("--worker-connections N: connections that a worker holds"),
    row<&C::max_requests, 0>("--max-requests N: then a new runner; 0: never"),
    row<&C::max_requests_jitter, 0>("--max-requests-jitter N: at random, up to N more"),
    row<&C::limit_request_line, 0, kMiB>("--limit-request-line BYTES: the longest; 0: 1 MiB"),
    row<&C::limit_request_fields, 0, 32768>("--limit-request-fields N: the most; 0: 32768"),
    row<&C::limit_request_field_size, 0, kMiB>(
        "--limit-request-field_size BYTES: longest header field; 0: the default"),
    row<&C::limit_request_body, 0, INT64_MAX>(
        "--limit-request-body BYTES: the longest; 0: no limit"),
    row<&C::chdir>("--chdir DIR: change to this directory first"),
    row<&C::pythonpath>("--pythonpath DIRS: to import from first; commas between several"),
    row<&C::raw_env>("-e, --env NAME=VALUE: set for the application; repeatable", check_variable),
    row<&C::worker_tmp_dir>("--worker-tmp-dir DIR: else /dev/shm, $TMPDIR or /tmp"),
    row<&C::accesslog>("--access-logfile FILE: write an access log; -: to stdout"),
    row<&C::access_log_format>("--access-logformat FORMAT: what its lines look like"),
    row<&C::errorlog>("--error-logfile FILE: for messages and what is printed; -: stderr"),
    {"--log-file FILE: the same as --error-logfile", set<&C::errorlog>, nullptr},
    row<&C::loglevel>("--log-level LEVEL: debug, info, warning, error or critical",
                      check_word<kLevels>),
    row<&C::python>("--python PATH: the Python that runs the application"),
    row<&C::runner>("--runner CMD: a program that answers in place of Python"),
    row<&C::forwarded_allow_ips>(
        "--forwarded-allow-ips IPS: proxies that may say https: addresses, networks or *",
        check_networks),
    row<&C::proxy_protocol>("--proxy-protocol: take PROXY headers, version 1 or 2"),
    row<&C::proxy_allow_from>("--proxy-allow-from IPS: who may send them: addresses, networks or *",
                              check_networks),
    row<&C::reload>("--reload: reload when a file of the application changes"),
    row<&C::reload_extra_files>("--reload-extra-file FILE: or this one; repeatable"),
    row<&C::daemon>("-D, --daemon: go on in the background"),
    row<&C::proc_name>("-n, --name NAME: in the titles of processes; else the application"),
    row<&C::pidfile>("-p, --pid FILE: write the process number of the arbiter to it"),
    row<&C::user>("-u, --user USER: that workers run as, by name or number"),
    row<&C::group>("-g, --group GROUP: that workers run as; else the user's"),
    row<&C::umask>("-m, --umask MODE: taken off the mode of unix sockets, octal", check_umask),
    {"--check-config: check settings, load the application, exit", set<&C::check_config>, nullptr},
    {"--print-config: print the settings and exit", set<&C::print_config>, nullptr},
    {"-v, --version: print the version and exit", set<&C::version>, nullptr},
    {"-h, --help: print this help and exit", set<&C::help>, nullptr},
};

/// Reads the option at args[i]: -x VALUE, -xVALUE, -x=VALUE, --name VALUE or --name=VALUE. Leaves
/// i at its last word.
Error parse_option(Config& config, const std::vector<const char*>& args, size_t& i) {
    const string arg = args[i];
    const bool is_long = arg[1] == '-';
    const size_t end = is_long ? std::min(arg.find('='), arg.size()) : 2;
    const Option* option = find(kOptions, [&](const Option& o) {
        return is_long ? arg.substr(2, end - 2) == o.name() : arg[1] == o.text[1];
    });
    if (option == nullptr) { return {2, "unknown option " + arg}; }
    const bool attached = arg.size() > end, takes_value = option->takes_value();
    if (!takes_value && attached) { return {2, arg + " takes no value"}; }
    if (takes_value && !attached && ++i == args.size()) { return {2, arg + " needs a value"}; }
    const string_view value = attached ? args[i] + end + (arg[end] == '=') : args[i];
    Error error = option->check != nullptr ? option->check(value) : Error{};
    int64_t number = 0;
    const bool is_number = option->low <= option->high;
    if (is_number) { error = read_number(value, option->low, option->high, number); }
    if (!error) { option->set(config, value, number); }
    return error ? Error{error.code, "--" + string(option->name()) + ": " + error.text} : error;
}

/// Takes settings from the environment, then from `args`, which win. Error code 2: wrong usage.
Error parse_command_line(const std::vector<const char*>& args, Config& config) {
    const string count = environment("WEB_CONCURRENCY"), port = environment("PORT");
    if (std::getenv("FORWARDED_ALLOW_IPS") != nullptr) {  // set but empty: trust no proxy
        config.forwarded_allow_ips = environment("FORWARDED_ALLOW_IPS");
        const Error error = check_networks(config.forwarded_allow_ips);
        if (error) { return {1, "$FORWARDED_ALLOW_IPS: " + error.text}; }
    }
    if (!count.empty()) {
        const Error error = check_workers(count);
        if (error) { return {1, "$WEB_CONCURRENCY: " + error.text}; }
        set_workers(config, count, 0);
    }
    bool options = true, have_app = false;
    for (size_t i = 0; i < args.size(); ++i) {
        const string_view arg = args[i];
        if (options && arg == "--") {
            options = false;
        } else if (options && arg.size() > 1 && arg.front() == '-') {
            if (Error error = parse_option(config, args, i)) { return error; }
        } else if (std::exchange(have_app, true)) {
            return {2, "one application only, not also " + in_quotes(arg)};
        } else {
            config.app = arg;
        }
    }
    if (config.bind.empty()) {
        config.bind = {port.empty() ? "127.0.0.1:8000" : "0.0.0.0:" + port};
    }
    const int field_size = Config{}.limit_request_field_size;
    if (config.limit_request_field_size == 0) { config.limit_request_field_size = field_size; }
    if (config.limit_request_fields == 0) { config.limit_request_fields = 32768; }
    return {};
}

void print_help() {
    Config defaults;
    (void)parse_command_line({}, defaults);
    string text =
        "usage: server [OPTIONS] [MODULE:CALLABLE]\n\n"
        "Serves a WSGI application, app_example:app unless another is named.\n";
    for (const Option& o : kOptions) {
        const string value = o.get != nullptr && o.takes_value() ? o.get(defaults) : "";
        (text += o.text[1] == '-' ? "\n      " : "\n  ") += o.usage();
        (text += "\n        ") += o.help() + (value.empty() ? "" : " [" + value + "]");
    }
    std::puts(text.c_str());
}

/// The settings, for --print-config and for the log at level debug.
string show_config(const Config& config) {
    string text = "app                       = " + config.app;
    for (const Option& o : kOptions) {
        string name(o.name());
        while (name.size() < 25) { name += ' '; }
        if (o.get != nullptr) { text += "\n" + name + " = " + o.get(config); }
    }
    return text;
}

// ============================================================================
//  3. Logs
//
//  A line is one write() with O_APPEND, so that lines of several processes never mix. Callers
//  escape whatever a client sent.
// ============================================================================
enum class Level { Debug, Info, Warning, Error, Critical };

struct Logger {
    Fd error_file, access_file;
    Level level = Level::Info;  // the lowest that is written
} g_log;

string time_text(const char* format, struct tm* (*convert)(const time_t*, struct tm*)) {
    const time_t now = std::time(nullptr);
    struct tm parts = {};
    convert(&now, &parts);
    char text[64];
    return string(text, std::strftime(text, sizeof text, format, &parts));
}

void log(Level level, const string& text) {
    if (level < g_log.level) { return; }
    const string now = time_text("[%Y-%m-%d %H:%M:%S %z] [", ::localtime_r);
    const string start = now + to_string(::getpid()) + "] [" + kLevels[static_cast<int>(level)];
    sigset_t ttou, before;  // else we would be stopped where background jobs may not print, or
    sigemptyset(&ttou), sigaddset(&ttou, SIGTTOU);  // write() repeated for ever, as TTOU is handled
    ::sigprocmask(SIG_BLOCK, &ttou, &before);
    (void)write_all(g_log.error_file, start + "] " + text + "\n");
    ::sigprocmask(SIG_SETMASK, &before, nullptr);
}

/// Sets the supplementary groups: all of a --user by name, else --group alone. -1: see errno.
int set_groups(const Config& config) {
    return config.user.empty() ? ::setgroups(1, &config.gid)
                               : ::initgroups(config.user.c_str(), config.gid);
}

/// While such an object lives, root has the rights of --user only (if `change`).
struct AsUser {
    const bool changed;
    const gid_t group = ::getegid();
    static inline gid_t groups[USHRT_MAX];  // too much for a small stack
    // Of a type that converts to what setgroups() takes: size_t, or int on other systems.
    const unsigned short count =
        static_cast<unsigned short>(std::max(::getgroups(USHRT_MAX, groups), 0));

    AsUser(const Config& config, bool change) : changed(change) {
        if (!change) { return; }
        (void)!set_groups(config);
        (void)!::setegid(config.gid);
        (void)!::seteuid(config.uid);
    }
    ~AsUser() {
        if (!changed) { return; }
        (void)!::seteuid(0);
        (void)!::setegid(group);
        (void)!::setgroups(count, groups);
    }
};

/// Whether --user could make a path to `directory` lead elsewhere: there is a symbolic link in it,
/// or the user owns or may write to a directory in it. Of those above `directory`, sticky ones (as
/// /tmp) do not count: there nobody can rename or remove what is another's.
bool can_redirect(const Config& config, string directory) {
    struct stat info = {};
    for (string part = directory; !part.empty(); part.resize(part.rfind('/'))) {
        if (::lstat(part.c_str(), &info) == 0 && S_ISLNK(info.st_mode)) { return true; }
    }
    const AsUser user(config, true);
    Fd probe;  // not faccessat(AT_EACCESS): before glibc 2.33 it asks for the real user, root
    for (bool last = true; !directory.empty(); last = false) {
        const bool seen = ::stat(directory.c_str(), &info) == 0;
        const bool writes =
            !make_temp_file(directory, probe) || (errno != EACCES && errno != EROFS);
        const bool sticky = !last && (info.st_mode & S_ISVTX) != 0;
        if (seen && (info.st_uid == config.uid || (writes && !sticky))) { return true; }
        directory.resize(directory.rfind('/'));
    }
    return false;
}

/// If we are root, gives a file of ours to --user; but not one with a second hard link, which may
/// be somebody else's file. False: chown failed.
bool give_away(const Config& config, const Fd& file) {
    struct stat info = {};
    const bool regular = ::fstat(file.get(), &info) == 0 && S_ISREG(info.st_mode);
    if (!regular || info.st_nlink > 1 || ::geteuid() != 0) { return true; }
    const bool group = info.st_gid != ::getegid();  // keep what logrotate or a setgid directory set
    return ::fchown(file.get(), config.uid, group ? info.st_gid : config.gid) == 0;
}

/// Opens or reopens a log; "-" is the descriptor `standard`, an empty path means no log. Root makes
/// the file and gives it to --user; but where can_redirect(), root opens it with that user's
/// rights, who could otherwise have the log written to, say, /etc/passwd.
Error open_log(const Config& config, const string& path, int standard, Fd& file) {
    if (path.empty()) { return {}; }
    const string directory = path.substr(0, path.rfind('/'));
    const bool root = ::geteuid() == 0 && config.uid != 0 && path != "-" && directory != "/dev";
    const bool other = root && can_redirect(config, directory);
    const int flags = O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC | (root && !other ? O_NOFOLLOW : 0);
    const AsUser user(config, other);
    Fd made(path == "-" ? ::fcntl(standard, F_DUPFD_CLOEXEC, 0)
                        : ::open(path.c_str(), flags | O_NONBLOCK, 0666));  // a FIFO would block
    if (!made) { return os_error("cannot open the log " + path); }
    if (path != "-" && !other) { ::fcntl(made.get(), F_SETFL, O_APPEND); }
    if (root && !other) { (void)give_away(config, made); }
    file = raise_fd(std::move(made));
    return {};
}

Error open_logs(const Config& config) {
    const auto named = [&](string_view level) { return same_name(level, config.loglevel); };
    g_log.level = Level(find(kLevels, named) - kLevels);
    const Error error = open_log(config, config.errorlog, STDERR_FILENO, g_log.error_file);
    for (const int fd : {STDOUT_FILENO, STDERR_FILENO}) {
        if (config.detached) { ::dup2(g_log.error_file.get(), fd); }
    }
    const int why = errno;
    const Error other = open_log(config, config.accesslog, STDOUT_FILENO, g_log.access_file);
    if (error) { errno = why; }
    return error ? error : other;
}

void add_variable(string& block, string_view name, string_view value) {
    (((block += name) += '\0') += value) += '\0';
}

/// A value in an environ block, NAME NUL value NUL …, by its name in any case; or a null data().
string_view lookup(string_view block, string_view name) {
    while (!block.empty()) {
        const string_view key = cut(block, '\0'), value = cut(block, '\0');
        if (same_name(key, name)) { return value; }
    }
    return {};
}

/// The value of a field in a response head, empty if there is none.
string_view head_field(string_view head, string_view name) {
    while (!head.empty()) {
        string_view line = cut(head, '\n');
        line = line.substr(0, line.find('\r'));
        if (same_name(cut(line, ':'), name)) { return trim(line); }
    }
    return {};
}

/// "User-Agent" as the environ's HTTP_USER_AGENT (RFC 3875 section 4.1.18).
string environ_name(string_view field) {
    const bool bare = same_name(field, "content-type") || same_name(field, "content-length");
    string name = bare ? "" : "HTTP_";
    for (const char c : field) {
        name += c == '-' ? '_' : c >= 'a' && c <= 'z' ? static_cast<char>(c - 32) : c;
    }
    return name;
}

/// The user of a Basic authorization, empty if there is none (RFC 7617 section 2).
string basic_user(string_view credentials) {
    static constexpr string_view kDigits =
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    if (!same_name(cut(credentials, ' '), "basic")) { return ""; }
    string text;
    size_t bits = 0, count = 0;  // count: how many bits do not make a whole byte yet
    for (const char c : trim(credentials)) {
        const size_t digit = kDigits.find(c);
        if (digit == string::npos) { break; }
        bits = (bits << 6 | digit) & 0xffff;
        count = (count + 6) % 8;
        if (count < 6) { text += static_cast<char>(bits >> count & 0xff); }
    }
    const size_t colon = text.find(':');
    return text.substr(0, colon == string::npos ? 0 : colon);
}

/// What an access-log line tells of one request.
struct Access {
    string_view env, head, line, peer;  // environ block; response head; request line; address
    int status = 0;
    int64_t body_bytes = 0;
    microseconds took{};
};

/// The text of one atom: "h", "{referer}i" … If it is unknown or has no value: "-", but an empty
/// text for h and q.
string access_atom(string_view name, const Access& a) {
    const auto shown = [](string_view text) { return text.empty() ? "-" : escape(text); };
    const auto variable = [&](string_view key) { return shown(lookup(a.env, key)); };
    const int64_t us = a.took.count();
    if (name.size() > 3 && name.front() == '{') {
        const string_view key = name.substr(1, name.size() - 3);
        if (name.back() == 'o') { return shown(head_field(a.head, key)); }
        return variable(name.back() == 'i' ? environ_name(key) : string(key));
    }
    switch (name.size() == 1 ? name.front() : '\0') {
        case 'h': return escape(a.peer);
        case 'u': return shown(basic_user(lookup(a.env, "HTTP_AUTHORIZATION")));
        case 't': return time_text("[%d/%b/%Y:%H:%M:%S %z]", ::localtime_r);
        case 'r': return shown(a.line);
        case 'm': return variable("REQUEST_METHOD");
        case 'U': return variable("PATH_INFO");
        case 'q': return escape(lookup(a.env, "QUERY_STRING"));
        case 'H': return variable("SERVER_PROTOCOL");
        case 's': return to_string(a.status);
        case 'B': return to_string(a.body_bytes);
        case 'b': return a.body_bytes != 0 ? to_string(a.body_bytes) : "-";
        case 'f': return variable("HTTP_REFERER");
        case 'a': return variable("HTTP_USER_AGENT");
        case 'T': return to_string(us / 1000000);
        case 'M': return to_string(us / 1000);
        case 'D': return to_string(us);
        case 'L':
            return to_string(us / 1000000) + "." + to_string(1000000 + us % 1000000).substr(1);
        case 'p': return "<" + to_string(::getpid()) + ">";
        default: return "-";
    }
}

/// A line of `format` with its %(atom)s, or %(atom)d, replaced, and %% by %.
string access_line(string_view format, const Access& access) {
    string line;
    while (!format.empty()) {
        const string_view start = format.substr(0, 2);
        const size_t end = start == "%(" ? format.find(')') : string::npos;
        const string_view type = format.substr(end == string::npos ? format.size() : end + 1, 1);
        const bool atom = type == "s" || type == "d";
        line += atom ? access_atom(format.substr(2, end - 2), access) : string(1, format.front());
        format.remove_prefix(atom ? end + 2 : start == "%%" ? 2 : 1);
    }
    return line + "\n";
}

// ============================================================================
//  4. Listeners
//
//  The arbiter binds once, before the first fork; every worker inherits the sockets.
// ============================================================================
struct Address {
    string text, host, port, path;  // text: as it was given; path: of a unix socket
    int fd = -1;                    // N of fd://N
    bool v6 = false;
};

/// Reads HOST:PORT, HOST, :PORT, [V6]:PORT, unix:PATH or fd://N, as gunicorn does.
Error parse_address(string_view text, Address& a) {
    const Error bad{1, in_quotes(text) + " is no address to listen on"};
    int64_t number = 0;
    a.text = text;
    if (text.substr(0, 5) == "fd://") {
        if (!parse_number(text.substr(5), number) || number >= FD_SETSIZE) { return bad; }
        a.fd = static_cast<int>(number);
        return {};
    }
    if (text.substr(0, 5) == "unix:") {
        a.path = text.substr(text.substr(5, 2) == "//" ? 7 : 5);
        return a.path.empty() || a.path.size() >= sizeof(sockaddr_un::sun_path) ? bad : Error{};
    }
    if (text.substr(0, 6) == "tcp://") { text.remove_prefix(6); }
    a.v6 = text.substr(0, 1) == "[";
    const size_t colon = text.find(':', a.v6 ? text.find(']') : 0);
    const string_view host = text.substr(0, colon);
    if (text.empty() || (a.v6 && host.find(']') != host.size() - 1)) { return bad; }
    a.port = colon != string::npos ? text.substr(colon + 1) : "8000";
    a.host = a.v6 ? host.substr(1, host.size() - 2) : host;
    const bool no_host = colon == string::npos && parse_number(a.host, number);  // it is a port
    return !no_host && parse_number(a.port, number) && number <= 65535 ? Error{} : bad;
}

struct Listener {
    Fd fd;
    string text, path;      // text: for the log, http://127.0.0.1:8000; path: of a unix socket
    string host, port;      // SERVER_NAME and SERVER_PORT; empty on a unix socket
    bool wildcard = false;  // bound to all addresses: SERVER_NAME depends on the connection
    int64_t bound_at = 0;   // see bound_at(); 0: the path is not ours to unlink
};

/// The numeric host and port of a socket address; both empty for a unix socket.
void address_text(const sockaddr_storage& address, string& host, string& port) {
    char text[INET6_ADDRSTRLEN] = "";
    const auto& v4 = reinterpret_cast<const sockaddr_in&>(address);
    const auto& v6 = reinterpret_cast<const sockaddr_in6&>(address);
    const bool is_v6 = address.ss_family == AF_INET6;
    if (!is_v6 && address.ss_family != AF_INET) { return; }
    const void* bytes = is_v6 ? static_cast<const void*>(&v6.sin6_addr) : &v4.sin_addr;
    host = ::inet_ntop(address.ss_family, bytes, text, sizeof text);
    if (is_v6 && IN6_IS_ADDR_V4MAPPED(&v6.sin6_addr)) { host.erase(0, std::strlen("::ffff:")); }
    port = to_string(ntohs(is_v6 ? v6.sin6_port : v4.sin_port));
}

sockaddr_storage socket_name(int fd) {
    sockaddr_storage address{};
    socklen_t size = sizeof address;
    ::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size);
    return address;
}

/// Accepted sockets inherit these; a unix socket refuses both. Bounds the unsent bytes in the
/// kernel: else a slow reader's socket may not be writable again before megabytes are read, and it
/// would be taken for dead. No Nagle: else a streamed piece waits for the client's (delayed) ACK.
void set_tcp_options(int fd) {
    const int on = 1;
    ::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
#ifdef TCP_NOTSENT_LOWAT
    const int bytes = 2 * kPiece;
    ::setsockopt(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &bytes, sizeof bytes);
#endif
}

/// Takes over a socket, which must listen and not be ours yet; describes it for log and environ.
Error describe(Fd fd, Listener& made) {
    int listening = 0;
    socklen_t size = sizeof listening;
    const int told = ::getsockopt(fd.get(), SOL_SOCKET, SO_ACCEPTCONN, &listening, &size);
    if (told < 0 && errno == ENOPROTOOPT) {  // macOS and OpenBSD: defined, but not supported
        listening = ::listen(fd.get(), SOMAXCONN) == 0;
    }
    if (!listening || ::fcntl(fd.get(), F_GETFD) != 0) {  // not 0: set_flags() below was here
        const string number = to_string(fd.release());
        return {1, "descriptor " + number + " is no listening socket, or is named twice"};
    }
    const sockaddr_storage name = socket_name(fd.get());
    address_text(name, made.host, made.port);
    const bool v6 = made.host.find(':') != string::npos;
    made.wildcard = made.host == (v6 ? "::" : "0.0.0.0");
    made.text = "http://" + (v6 ? "[" + made.host + "]" : made.host) + ":" + made.port;
    if (name.ss_family == AF_UNIX) {
        made.path = reinterpret_cast<const sockaddr_un&>(name).sun_path;
        made.text = "unix:" + made.path;
    }
    set_flags(fd.get(), true);
    set_tcp_options(fd.get());
    made.fd = std::move(fd);
    return {};
}

/// Tells our unix socket's file from one that another server has put in its place, which we must
/// not unlink. By mtime, since inode numbers are soon used again. 0: there is no file.
int64_t bound_at(const string& path) {
    struct stat info = {};
    return ::lstat(path.c_str(), &info) == 0 ? nanoseconds(info.st_mtim) : 0;
}

/// Makes way for a unix socket: removes a stale one, never a live one or another kind of file.
Error clear_path(const string& path, const sockaddr_un& name) {
    struct stat info = {};
    if (::lstat(path.c_str(), &info) < 0) { return {}; }
    if (!S_ISSOCK(info.st_mode)) { return {1, path + " exists and is no socket"}; }
    const Fd probe(::socket(AF_UNIX, SOCK_STREAM, 0));
    set_flags(probe.get(), true);
    const auto address = reinterpret_cast<const sockaddr*>(&name);
    const int live = ::connect(probe.get(), address, sizeof name);
    if (live < 0 && errno == ECONNREFUSED) { ::unlink(path.c_str()); }
    return {};  // if it is live, bind() fails with EADDRINUSE
}

/// The socket address that bind() needs, and its size.
Error resolve(const Address& address, sockaddr_storage& name, socklen_t& size) {
    if (!address.path.empty()) {
        auto& unix_name = reinterpret_cast<sockaddr_un&>(name);
        unix_name.sun_family = AF_UNIX;
        std::memcpy(unix_name.sun_path, address.path.data(), address.path.size());
        size = sizeof unix_name;
        return clear_path(address.path, unix_name);
    }
    struct addrinfo hints = {};
    struct addrinfo* found = nullptr;
    hints.ai_family = address.v6 ? AF_INET6 : AF_INET;
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
    const char* host = address.host.empty() ? nullptr : address.host.c_str();
    const int problem = ::getaddrinfo(host, address.port.c_str(), &hints, &found);
    if (problem != 0) {
        return {1, "cannot listen on " + address.text + ": " + ::gai_strerror(problem)};
    }
    std::memcpy(&name, found->ai_addr, size = found->ai_addrlen);
    ::freeaddrinfo(found);
    return {};
}

/// Binds one address and listens, or takes over fd://N, which already does.
Error bind_address(const Address& address, const Config& config, Listener& made) {
    if (address.fd >= 0) { return describe(Fd(address.fd), made); }
    sockaddr_storage name{};
    socklen_t size = 0;
    if (Error error = resolve(address, name, size)) { return error; }
    Fd fd(::socket(name.ss_family, SOCK_STREAM, 0));
    if (!fd) { return os_error("cannot listen on " + address.text); }
    const int on = 1;
    ::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (address.v6) { ::setsockopt(fd.get(), IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof on); }
    int64_t wanted = 0;
    parse_number(config.umask, wanted, 8);
    const mode_t mask = ::umask(static_cast<mode_t>(wanted));
    const int bound = ::bind(fd.get(), reinterpret_cast<sockaddr*>(&name), size);
    ::umask(mask);
    if (bound < 0 || ::listen(fd.get(), config.backlog) < 0) {
        return os_error("cannot listen on " + address.text);
    }
    if (Error error = describe(std::move(fd), made)) { return error; }
    made.bound_at = bound_at(made.path);
    if (!made.path.empty() && ::geteuid() == 0) {
        (void)!::lchown(made.path.c_str(), config.uid, config.gid);
    }
    return {};
}

/// Removes the unix sockets that are still ours.
void unlink_sockets(const std::list<Listener>& listeners) {
    for (const Listener& each : listeners) {
        const bool ours = each.bound_at != 0 && each.bound_at == bound_at(each.path);
        if (ours) { ::unlink(each.path.c_str()); }
    }
}

// ============================================================================
//  5. Process chores: users, files of our own, supervisors
//
//  Each is a few system calls whose order matters.
// ============================================================================

/// Finds the numbers of --user and --group. Only root can become another user.
Error resolve_user(Config& config) {
    int64_t uid, gid = ::getegid();
    const bool number = parse_number(config.user, uid) && uid < UINT32_MAX;
    if (config.user.empty()) { uid = ::geteuid(); }
    if (number && !config.group.empty()) {
        config.user.clear();  // no lookup is needed, and a static glibc may be unable to do one
    } else if (!config.user.empty()) {
        const struct passwd* entry =
            number ? ::getpwuid(static_cast<uid_t>(uid)) : ::getpwnam(config.user.c_str());
        if (entry == nullptr) {
            return {
                1, "there is no user " + in_quotes(config.user) + (number ? ": name a group" : "")};
        }
        uid = entry->pw_uid, gid = entry->pw_gid, config.user = entry->pw_name;
    }
    if (!config.group.empty() && (!parse_number(config.group, gid) || gid >= UINT32_MAX)) {
        const struct group* entry = ::getgrnam(config.group.c_str());
        if (entry == nullptr) { return {1, "there is no group " + in_quotes(config.group)}; }
        gid = entry->gr_gid;
    }
    config.uid = static_cast<uid_t>(uid);
    config.gid = static_cast<gid_t>(gid);
    const bool other = config.uid != ::geteuid() || config.gid != ::getegid();
    return other && ::geteuid() != 0 ? Error{1, "only root can run workers as someone else"}
                                     : Error{};
}

/// In a worker: becomes the user and group that resolve_user() found.
Error drop_privileges(const Config& config) {
    if (config.uid == ::geteuid() && config.gid == ::getegid()) { return {}; }
    const bool good =
        set_groups(config) == 0 && ::setgid(config.gid) == 0 && ::setuid(config.uid) == 0;
    return good ? Error{} : os_error("cannot become the user of --user");
}

/// The process that a pid file names, 0 if there is none.
pid_t read_pidfile(const string& path) {
    const Fd file(::open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC));  // a FIFO would block
    char text[32] = "";
    int64_t pid = 0;
    (void)!::read(file.get(), text, sizeof text - 1);
    const bool good = parse_number({text, std::strcspn(text, "\n")}, pid) && pid <= INT_MAX;
    return good ? static_cast<pid_t>(pid) : 0;
}

/// Refuses a pid file that names a live process (but not for --check-config: that the server runs
/// is no fault of its settings), that cannot be written, or whose place is taken, as /dev/null is.
Error check_pidfile(const Config& config) {
    const string& path = config.pidfile;
    if (path.empty()) { return {}; }
    struct stat info = {};
    const bool taken = ::stat(path.c_str(), &info) == 0 && !S_ISREG(info.st_mode);
    if (taken) { return {1, path + " exists and is no regular file"}; }
    const pid_t pid = read_pidfile(path);
    const bool alive = pid > 0 && pid != ::getpid() && (::kill(pid, 0) == 0 || errno == EPERM);
    if (alive && !config.check_config) {
        return {1, path + " names process " + to_string(pid) + ", which runs"};
    }
    Fd probe;
    const string directory = path.substr(0, path.rfind('/') + 1) + ".";
    return make_temp_file(directory, probe) ? os_error("cannot write " + path) : Error{};
}

/// Writes our pid to a new file and renames that, so that nobody ever reads half a number.
Error write_pidfile(const string& path) {
    if (path.empty()) { return {}; }
    string temp = path + ".XXXXXX";
    const Fd file(::mkstemp(temp.data()));
    const bool good = file && write_all(file, to_string(::getpid()) + "\n") &&
                      ::fchmod(file.get(), 0644) == 0 && ::rename(temp.c_str(), path.c_str()) == 0;
    const Error error = good ? Error{} : os_error("cannot write " + path);
    if (!good) { ::unlink(temp.c_str()); }
    return error;
}

/// Continues in a child without a terminal, in a session of its own, in the same directory.
Error daemonize(Config& config) {
    set_signals({SIGHUP}, SIG_IGN);  // the terminal may close before setsid(); see kSignals
    for (int i = 0; i < 2; ++i) {    // twice: only a session leader could acquire a terminal again
        const pid_t pid = ::fork();
        if (pid < 0) { return os_error("cannot fork"); }
        if (pid > 0) { ::_exit(0); }
        if (i == 0) { ::setsid(); }
    }
    const Fd null(::open("/dev/null", O_RDWR | O_CLOEXEC));
    for (const int fd : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) {
        if (::fcntl(fd, F_GETFD) == 0) { ::dup2(null.get(), fd); }  // not 0: a listener, by fd://0
    }
    config.detached = true;
    return open_logs(config);
}

/// Finds memory for titles: that of the arguments, or our own, which ps then shows instead.
void make_title_room(Config& config, char** argv, int argc) {
    char* const last = argv[argc - 1];
    config.title = argv[0];
    config.title_size = static_cast<size_t>(last + std::strlen(last) - config.title) + 1;
#ifdef PR_SET_MM_MAP  // see prctl(2); the fields have their numbers from proc(5)
    char stat[1024] = "";
    const Fd file(::open("/proc/self/stat", O_RDONLY | O_CLOEXEC));
    (void)!::read(file.get(), stat, sizeof stat - 1);
    string_view line = stat;
    line.remove_prefix(std::min(line.rfind(')') + 2, line.size()));
    int64_t fields[52] = {};
    for (int i = 3; i < 52; ++i) { parse_number(cut(line, ' '), fields[i]); }
    const auto field = [&fields](int i) { return static_cast<uint64_t>(fields[i]); };
    const size_t size = 200;
    static char* const room = new char[size]();  // on the heap: Linux shows anonymous memory only
    prctl_mm_map map{};
    map.start_code = field(26), map.end_code = field(27), map.start_stack = field(28);
    map.start_data = field(45), map.end_data = field(46), map.start_brk = field(47);
    map.brk = reinterpret_cast<uint64_t>(::sbrk(0));
    map.arg_start = reinterpret_cast<uint64_t>(room), map.arg_end = map.arg_start + size;
    map.env_start = field(50), map.env_end = field(51);
    map.exe_fd = static_cast<uint32_t>(-1);
    if (::prctl(PR_SET_MM, PR_SET_MM_MAP, &map, sizeof map, 0) < 0) { return; }
    config.title = room;
    config.title_size = size;
#endif
}

/// "server: worker [app] GET /" for ps; top shows the start of the part before `what`.
void set_title(const Config& config, const char* role, const string& what = "") {
    string title = string("server: ") + role + " [" + config.proc_name + "]";
#ifdef __linux__
    if (what.empty()) { ::prctl(PR_SET_NAME, title.c_str()); }
#endif
    if (!what.empty()) { title += " " + what; }
    title.resize(config.title_size - 1);
    std::memcpy(config.title, title.data(), title.size());
}

/// Sends systemd our state, if it has asked for that with $NOTIFY_SOCKET (sd_notify(3)).
void notify_systemd(const string& state) {
    sockaddr_un name{};
    name.sun_family = AF_UNIX;
    const string path = environment("NOTIFY_SOCKET");
    if (path.empty() || path.size() >= sizeof name.sun_path) { return; }
    std::memcpy(name.sun_path, path.data(), path.size());
    if (path.front() == '@') { name.sun_path[0] = '\0'; }
    const socklen_t size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + path.size());
    const Fd fd(::socket(AF_UNIX, SOCK_DGRAM, 0));
    ::sendto(fd.get(), state.data(), state.size(), 0, reinterpret_cast<sockaddr*>(&name), size);
}

// ============================================================================
//  6. Request: bytes to meaning
//
//  Nothing here touches a socket: input is a view of what has arrived so far. The same bytes give
//  the same result, whether they arrive at once or one by one. RFC 9112 throughout, and strict:
//  what two parsers could understand differently is refused, as it could smuggle a request.
// ============================================================================
constexpr int kMaxHead = 1 << 20, kMaxChunkLine = 8192;  // bytes, whatever the limits say

struct Request {
    string method, target, path, query, host;  // host: of an absolute target
    int minor = 0;                             // HTTP/1.minor, 0 or 1
    using Fields = std::map<string, string, std::less<string_view>>;
    Fields fields;            // by their names in the environ; repeated ones are joined
    size_t field_memory = 0;  // bytes that these take, roughly
    int64_t length = -1;      // Content-Length; -1: none
    bool expect_continue = false;
    int says_https = 0, says_http = 0;  // how many kSecure fields say so

    /// A field by its name in the environ; data() is null if there is none.
    string_view field(const char* name) const {
        const auto found = fields.find(name);
        return found == fields.end() ? string_view() : found->second;
    }
};

bool is_alnum(char c) { return is_digit(c) || (lower(c) >= 'a' && lower(c) <= 'z'); }

/// Whether there is nothing but letters, digits and `others`.
bool is_made_of(string_view text, string_view others) {
    return !find(text, [others](char c) { return !is_alnum(c) && others.find(c) == string::npos; });
}

/// tchar (RFC 9110 section 5.6.2).
bool is_token(string_view text) { return !text.empty() && is_made_of(text, "!#$%&'*+-.^_`|~"); }

/// No controls but tab: the rule for field values (RFC 9110 section 5.5).
bool is_field_value(string_view text) {
    return !find(text, [](char c) {
        return (static_cast<unsigned char>(c) < ' ' && c != '\t') || c == 0x7f;
    });
}

/// The byte that %XX at text[i] stands for, -1 if it is malformed.
int percent_byte(string_view text, size_t i) {
    int64_t byte = -1;
    const bool good = i + 2 < text.size() && parse_number(text.substr(i + 1, 2), byte, 16);
    return good ? static_cast<int>(byte) : -1;
}

/// Decodes %XX; a malformed one stays as it is. False: there is a %00.
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
    const size_t end = std::min(text.find(':', text.rfind(']') + 1), text.size());
    if (text.find_first_not_of("0123456789", end + 1) != string::npos) { return false; }
    const string_view name = text.substr(0, end);
    for (size_t i = 0; i < end; ++i) {
        if (name[i] == '%' && percent_byte(name, i) < 0) { return false; }
    }
    in6_addr v6;
    const bool literal = end > 1 && name.front() == '[' && name.back() == ']';
    return literal ? ::inet_pton(AF_INET6, string(name.substr(1, end - 2)).c_str(), &v6) == 1
                   : is_made_of(name, "%-._~!$&'()*+,;=");
}

/// Splits a field line at its colon (RFC 9112 section 5). False: obs-fold, whitespace before the
/// colon, no name, or control characters.
bool split_field(string_view line, string_view& name, string_view& value) {
    const bool colon = line.find(':') != string::npos;
    name = cut(line, ':');
    value = trim(line);
    return colon && is_token(name) && is_field_value(value);
}

enum class Parse { NeedMore, Head, Data, Done, Bad };

/// How proxies say that a client came by https; with any other value, that it did not.
constexpr string_view kSecure[][2] = {
    {"x-forwarded-proto", "https"}, {"x-forwarded-protocol", "ssl"}, {"x-forwarded-ssl", "on"}};

/// Reads one request: its head line by line, its body by Content-Length or in chunks.
class RequestParser {
public:
    explicit RequestParser(const Config& config) : config_(config) {}

    enum class Part { RequestLine, Fields, Data, DataEnd, ChunkSize, Trailers, End };

    /// How far it has come. In the body this is all that another worker's parser needs to go on.
    struct Framing {
        Part part = Part::RequestLine;
        int fields = 0;    // in the head, then in the trailer section
        int64_t left = 0;  // bytes of the body or of the chunk still to come
        bool chunked = false;
    };

    Framing at;
    Request request;
    string request_line;  // as much as a log shows; to be escaped there
    Error error;          // after Bad

    /// Takes bytes from the front of `in`. Head: the head is complete, call again. Data: `piece` is
    /// part of the body, call again. NeedMore: call again with what is left of `in`, and more.
    Parse next(string_view& in, string_view& piece) {
        while (at.part != Part::End) {
            if (at.part == Part::Data) {
                piece = in.substr(0, static_cast<size_t>(std::min<int64_t>(at.left, INT_MAX)));
                if (piece.empty()) { return Parse::NeedMore; }
                in.remove_prefix(piece.size());
                at.left -= static_cast<int64_t>(piece.size());
                if (at.left == 0) { at.part = at.chunked ? Part::DataEnd : Part::End; }
                return Parse::Data;
            }
            const size_t end = in.find('\n', scanned_);
            string_view line = in.substr(0, end);
            const bool crlf = !line.empty() && line.back() == '\r', head = at.part <= Part::Fields;
            if (crlf) { line.remove_suffix(1); }
            if (at.part == Part::RequestLine) { request_line = line.substr(0, kMaxShown); }
            error = check_size(line.size());
            scanned_ = end == string::npos ? in.size() : 0;
            if (!error && end == string::npos) { return Parse::NeedMore; }
            if (!error && !crlf) { error = {400, "a line ends without CR"}; }
            if (!error) { error = take_line(line); }
            if (error) { return Parse::Bad; }
            in.remove_prefix(end + 1);
            head_size_ += head ? end + 1 : 0;
            if (head && at.part > Part::Fields) { return Parse::Head; }
        }
        return Parse::Done;
    }

private:
    Error check_size(size_t line) const {
        const bool first = at.part == Part::RequestLine, in_head = first || at.part == Part::Fields;
        const bool in_chunks = at.part == Part::ChunkSize || at.part == Part::DataEnd;
        const int limit = first                        ? config_.limit_request_line
                          : at.part == Part::ChunkSize ? kMaxChunkLine
                          : at.part == Part::DataEnd   ? 0
                                                       : config_.limit_request_field_size;
        const bool fits = line <= static_cast<size_t>(limit) || (first && limit == 0);
        if (fits && (!in_head || head_size_ + line <= size_t{kMaxHead})) { return {}; }
        return first       ? Error{414, "the request line is too long"}
               : in_chunks ? Error{400, "not a chunk"}
                           : Error{431, "a header field is too long"};
    }

    Error take_line(string_view line) {
        if (at.part == Part::RequestLine) {
            if (line.empty() && head_size_ == 0) { return {}; }  // allowed: RFC 9112 section 2.2
            at.part = Part::Fields;
            return take_request_line(line);
        }
        if (at.part == Part::ChunkSize) { return take_chunk_size(line); }
        if (at.part == Part::DataEnd) { return at.part = Part::ChunkSize, Error{}; }
        if (!line.empty()) { return take_field(line); }
        if (at.part == Part::Fields) { return finish_head(); }
        return at.part = Part::End, Error{};
    }

    /// method SP request-target SP HTTP-version (RFC 9112 section 3).
    Error take_request_line(string_view line) {
        Request& r = request;
        r.method = cut(line, ' ');
        r.target = cut(line, ' ');
        const bool lower_case = find(r.method, [](char c) { return c >= 'a' && c <= 'z'; });
        const bool fits = r.method.size() >= 3 && r.method.size() <= 20;
        if (!fits || lower_case || !is_token(r.method)) { return {400, "not a request method"}; }
        if (r.target.empty() || r.target.find('\t') != string::npos || !is_field_value(r.target)) {
            return {400, "not a request target"};
        }
        const Error error_of_version = take_version(line);
        return error_of_version ? error_of_version : take_target();
    }

    /// "HTTP/" DIGIT "." DIGIT (RFC 9112 section 2.3); 1.2 and the like are served as 1.1.
    Error take_version(string_view text) {
        const bool http = cut(text, '/') == "HTTP" && !text.empty() && is_digit(text.back());
        if (!http || text.find_first_not_of("0123456789.") != string::npos) {
            return {400, "not an HTTP version"};
        }
        request.minor = text.back() == '0' ? 0 : 1;
        return text.size() == 3 && text.substr(0, 2) == "1." ? Error{} : Error{505, "not HTTP/1"};
    }

    /// Origin, absolute and asterisk form (RFC 9112 section 3.2).
    Error take_target() {
        Request& r = request;
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

    /// A field of the head, or of the trailer section, whose fields are checked and dropped.
    Error take_field(string_view line) {
        Request& r = request;
        string_view name, value;
        if (++at.fields > config_.limit_request_fields) { return {431, "too many header fields"}; }
        if (!split_field(line, name, value)) { return {400, "not a header field"}; }
        const auto is = [&](string_view other) { return same_name(name, other); };
        const bool is_length = is("content-length"), is_host_field = is("host");
        if (at.part == Part::Trailers) {
            const bool bad = is_length || is_host_field || is("transfer-encoding");
            return bad ? Error{400, "not a trailer field"} : Error{};
        }
        // X_Y would pass for X-Y in the environ; HTTP_PROXY would redirect the application's own
        // requests ("httpoxy").
        if (name.find('_') != string::npos || is("proxy")) { return {}; }
        if (is_length) {
            const bool good = r.length < 0 && parse_number(value, r.length);
            return good ? Error{} : Error{400, "not one good Content-Length"};
        }
        for (const auto& [proxy_field, yes] : kSecure) {
            if (is(proxy_field)) { ++(value == yes ? r.says_https : r.says_http); }
        }
        if (is_host_field && !is_host(value)) { return {400, "not a host"}; }
        r.field_memory += 160 + line.size();
        if (is_host_field && !r.host.empty()) { value = r.host; }  // RFC 9112 section 3.2.2
        const auto [known, is_new] = r.fields.emplace(environ_name(name), value);
        if (is_new) { return {}; }
        if (is_host_field || is("content-type")) { return {400, "two of " + known->first}; }
        return (known->second += is("cookie") ? "; " : ",") += value, Error{};
    }

    /// What needs the whole head: the host, Expect, and how the body is framed.
    Error finish_head() {
        Request& r = request;
        string_view host = r.host;  // the target's, which counts even without a Host field
        if (!host.empty()) { r.fields.emplace(string("HTTP_HOST"), host); }
        const string_view expect = r.field("HTTP_EXPECT");
        r.expect_continue = !expect.empty() && r.minor > 0;
        if (!expect.empty() && !same_name(expect, "100-continue")) {
            return {417, "not an expectation"};
        }
        at.left = std::max<int64_t>(r.length, 0);
        at.part = at.left > 0 ? Part::Data : Part::End;
        const string_view codings = r.field("HTTP_TRANSFER_ENCODING");
        return codings.data() != nullptr ? take_codings(string(codings) + ",") : Error{};
    }

    /// `value` has a comma after each coding. Exactly one `chunked`, in HTTP/1.1, without a
    /// Content-Length: anything else could smuggle a request (RFC 9112 sections 6.1 and 6.3).
    Error take_codings(string_view value) {
        Request& r = request;
        if (r.minor == 0 || r.length >= 0) {
            return {400, "Transfer-Encoding beside Content-Length, or in HTTP/1.0"};
        }
        int codings = 0;
        for (; !value.empty(); ++codings) {
            const string_view coding = trim(cut(value, ','));
            if (!is_token(coding) || at.chunked) { return {400, "not a Transfer-Encoding"}; }
            at.chunked = same_name(coding, "chunked");
        }
        at.fields = 0;
        at.part = Part::ChunkSize;
        return at.chunked && codings == 1 ? Error{} : Error{501, "a coding other than chunked"};
    }

    /// chunk-size [ chunk-ext ] (RFC 9112 section 7.1), perhaps with whitespace between them.
    Error take_chunk_size(string_view line) {
        string_view size = line.substr(0, line.find(';'));
        if (size.size() < line.size()) { size = size.substr(0, size.find_last_not_of(" \t") + 1); }
        if (size.size() > 16 || !is_field_value(line) || !parse_number(size, at.left, 16)) {
            return {400, "not a chunk size"};
        }
        at.part = at.left > 0 ? Part::Data : Part::Trailers;
        return {};
    }

    const Config& config_;
    size_t scanned_ = 0, head_size_ = 0;  // bytes searched for LF in vain; bytes of the head so far
};

/// Whether a list of addresses and networks (10.0.0.0/8, ::1, *) holds an address. A client on a
/// unix socket has none, and is trusted.
bool is_listed(string_view list, const string& address) {
    Network wanted, listed;
    if (address.empty() || !parse_network(address, wanted)) { return address.empty(); }
    while (!list.empty()) {
        const string_view entry = trim(cut(list, ','));
        if (entry == "*") { return true; }
        if (!parse_network(entry, listed) || wanted.v6 != listed.v6) { continue; }
        const size_t bytes = static_cast<size_t>(listed.bits / 8);  // `others`: bits beyond these
        const int others = (wanted.address[bytes] ^ listed.address[bytes]) >> (8 - listed.bits % 8);
        const bool same = std::memcmp(wanted.address, listed.address, bytes) == 0;
        if (same && others == 0) { return true; }
    }
    return false;
}

/// Both ends of a connection: SERVER_NAME, SERVER_PORT, REMOTE_ADDR, REMOTE_PORT.
struct Endpoints {
    string server, server_port, peer, peer_port;  // all empty on a unix socket
};

/// PROXY TCP4 SOURCE DESTINATION PORT PORT CR LF, of 107 bytes at the most.
Parse take_proxy_v1(string_view& in, Endpoints& ends) {
    const size_t end = in.substr(0, 107).find("\r\n");
    if (end == string::npos) { return in.size() < 107 ? Parse::NeedMore : Parse::Bad; }
    string_view line = in.substr(0, end);
    in.remove_prefix(end + 2);
    cut(line, ' ');
    const string_view protocol = cut(line, ' ');
    if (protocol == "UNKNOWN") { return Parse::Done; }
    const string_view peer = cut(line, ' '), server = cut(line, ' '), port = cut(line, ' ');
    const bool v6 = protocol == "TCP6";
    int64_t number = 0;
    for (const string_view address : {peer, server}) {
        Network network;
        const bool plain = address.find('/') == string::npos;
        if (!plain || !parse_network(address, network) || network.v6 != v6) { return Parse::Bad; }
    }
    for (const string_view text : {line, port}) {  // the client's last: `number` is to keep it
        if (!parse_number(text, number) || number > 65535) { return Parse::Bad; }
    }
    ends.peer = peer;
    ends.peer_port = to_string(number);
    return v6 || protocol == "TCP4" ? Parse::Done : Parse::Bad;
}

/// 12 bytes of signature, version and command, family, length (2), and the addresses.
Parse take_proxy_v2(string_view& in, Endpoints& ends) {
    if (in.size() < 16) { return Parse::NeedMore; }
    const auto byte = [in](size_t i) { return static_cast<unsigned char>(in[i]); };
    const unsigned command = byte(12), family = byte(13);
    const size_t size = 16 + (byte(14) * size_t{256} + byte(15));
    const bool proxied = command == 0x21, v4 = family == 0x11, v6 = family == 0x21;
    const size_t least = 16 + (!proxied ? 0 : v4 ? 12 : v6 ? 36 : 0);
    const bool known = (proxied || command == 0x20) && family >> 4 <= 3 && (family & 15) <= 2;
    if (!known || size < least) { return Parse::Bad; }
    if (in.size() < size) { return Parse::NeedMore; }
    if (proxied && (v4 || v6)) {
        char text[INET6_ADDRSTRLEN] = "";
        const size_t port = v4 ? 24 : 48;
        ends.peer = ::inet_ntop(v4 ? AF_INET : AF_INET6, in.data() + 16, text, sizeof text);
        ends.peer_port = to_string(byte(port) * 256 + byte(port + 1));
    }
    in.remove_prefix(size);
    return Parse::Done;
}

/// Removes a PROXY header of either version from the front of what a connection sent, and sets the
/// client's address from it (HAProxy's proxy-protocol.txt, section 2). Done, too, if there is none.
Parse take_proxy_header(string_view& in, Endpoints& ends) {
    static constexpr string_view kV1 = "PROXY ", kV2("\r\n\r\n\0\r\nQUIT\n", 12);
    for (const string_view start : {kV1, kV2}) {
        if (in.substr(0, start.size()) != start.substr(0, in.size())) { continue; }
        if (in.size() < start.size()) { return Parse::NeedMore; }
        return start == kV1 ? take_proxy_v1(in, ends) : take_proxy_v2(in, ends);
    }
    return Parse::Done;
}

/// The environ block, NAME NUL value NUL …, with CONTENT_LENGTH first (PEP 3333, SCGI).
string make_environ(const Request& r, const Endpoints& ends, string_view scheme = "http") {
    const string script = environment("SCRIPT_NAME");
    string_view prefix = script, path = r.path;
    if (path.substr(0, prefix.size()) != prefix ||
        (path.size() > prefix.size() && path[prefix.size()] != '/')) {
        prefix = {};  // not below it: SCRIPT_NAME and PATH_INFO together must be the path
    }
    string_view server = ends.server, port = ends.server_port;
    if (server.empty()) {
        const string_view host = r.field("HTTP_HOST");
        server = host.substr(0, host.find(':', host.rfind(']') + 1));
        port = host.substr(std::min(server.size() + 1, host.size()));
        if (server.empty()) { server = "localhost"; }  // PEP 3333: never empty
        if (port.empty()) { port = scheme == "https" ? "443" : "80"; }
    }
    const std::pair<string_view, string_view> variables[] = {
        {"REQUEST_METHOD", r.method},
        {"SCRIPT_NAME", prefix},
        {"PATH_INFO", path.substr(prefix.size())},
        {"QUERY_STRING", r.query},
        {"RAW_URI", r.target},
        {"REQUEST_URI", r.target},
        {"SERVER_PROTOCOL", r.minor > 0 ? "HTTP/1.1" : "HTTP/1.0"},
        {"SERVER_NAME", server},
        {"SERVER_PORT", port},
        {"REMOTE_ADDR", ends.peer},
        {"REMOTE_PORT", ends.peer_port},
        {"wsgi.url_scheme", scheme}};
    string block;
    block.reserve(1024);
    add_variable(block, "CONTENT_LENGTH", r.length < 0 ? "" : to_string(r.length));
    for (const auto& [name, value] : variables) { add_variable(block, name, value); }
    for (const auto& [name, value] : r.fields) {
        const bool framing = name == "HTTP_TRANSFER_ENCODING";  // the application's body is decoded
        if (!framing) { add_variable(block, name, value); }
    }
    return block;
}

// ============================================================================
//  7. Response: what the application said, checked, and the head that the client gets
//
//  Pure functions, as for requests: nothing in the application's head is sent on unchecked.
// ============================================================================
struct Response {
    int status = 0;  // 0: there is none yet
    string line, fields;
    int64_t length = -1;  // Content-Length; -1: none
    bool has_date = false, has_server = false;
    string dropped;  // names of hop-by-hop fields, which PEP 3333 forbids to applications
};

/// Reads "Status: 200 OK\nName: value\n…" as a runner sends it. An error says what is wrong.
Error parse_response(string_view head, Response& r) {
    static constexpr string_view kHopByHop[] = {
        "connection", "keep-alive", "proxy-authenticate", "proxy-authorization",
        "te",         "trailer",    "trailers",           "transfer-encoding",
        "upgrade"};
    int64_t status = 0;
    const bool named = cut(head, ' ') == "Status:";
    r.line = cut(head, '\n');
    if (!named || r.line.size() < 4 || r.line[3] != ' ' || !is_field_value(r.line) ||
        !parse_number(string_view(r.line).substr(0, 3), status) || status < 200) {
        return {500, "the status " + in_quotes(escape(r.line))};
    }
    while (!head.empty()) {
        const string_view line = cut(head, '\n');
        string_view name, value;
        if (!split_field(line, name, value)) {
            return {500, "the header field " + in_quotes(escape(line))};
        }
        const auto is = [&name](string_view other) { return same_name(name, other); };
        if (is("content-length")) {
            const bool good = r.length < 0 && parse_number(value, r.length);
            if (!good) { return {500, "the Content-Length " + in_quotes(escape(value))}; }
            if (status == 204) { continue; }  // must not have it: RFC 9110 section 8.6
        }
        if (find(kHopByHop, is)) {
            (r.dropped += r.dropped.empty() ? "" : ", ") += name;
            continue;
        }
        if (is("date") && std::exchange(r.has_date, true)) { continue; }
        if (is("server") && std::exchange(r.has_server, true)) { continue; }
        (((r.fields += name) += ": ") += value) += "\r\n";
    }
    r.status = static_cast<int>(status);
    return {};
}

/// The head as it goes to the client, with a Date (RFC 9110 section 5.6.7) made once a second.
string final_head(const Response& r, int minor, bool chunked) {
    static time_t last = 0;
    static char date[40];
    if (const time_t now = std::time(nullptr); now != std::exchange(last, now)) {
        const string text = time_text("Date: %a, %d %b %Y %H:%M:%S GMT\r\n", ::gmtime_r);
        std::memcpy(date, text.c_str(), text.size() + 1);
    }
    string head = minor > 0 ? "HTTP/1.1 " : "HTTP/1.0 ";
    head.reserve(256);
    (head += r.line) += r.has_server ? "\r\n" : "\r\nServer: server\r\n";
    ((head += r.has_date ? "" : date) += "Connection: close\r\n") += r.fields;
    head += chunked ? "Transfer-Encoding: chunked\r\n\r\n" : "\r\n";
    return head;
}

/// An error page of the server's own. It echoes nothing of the request, which could be a script.
Response error_response(int status, string& body) {
    static constexpr string_view kLines =
        "400 Bad Request\n"
        "403 Forbidden\n"
        "408 Request Timeout\n"
        "413 Content Too Large\n"
        "414 URI Too Long\n"
        "417 Expectation Failed\n"
        "431 Request Header Fields Too Large\n"
        "500 Internal Server Error\n"
        "501 Not Implemented\n"
        "502 Bad Gateway\n"
        "503 Service Unavailable\n"
        "504 Gateway Timeout\n"
        "505 HTTP Version Not Supported\n"
        "507 Insufficient Storage\n";
    string_view line = kLines.substr(kLines.find(to_string(status)));
    Response r;
    r.status = status;
    r.line = cut(line, '\n');
    body = r.line + "\n";
    r.fields = "Content-Type: text/plain\r\nContent-Length: " + to_string(body.size()) + "\r\n";
    if (status == 503) { r.fields += "Retry-After: 10\r\n"; }
    return r;
}

// ============================================================================
//  8. Bridge: the runner, and the pipes to it
//
//  worker → runner   N:CONTENT_LENGTH NUL len NUL NAME NUL value NUL … ,body    a request (SCGI)
//                    0:,     the client has gone; only after the whole body; ignored when idle
//                    N:path, for the Python runner, when idle: reopen the error log at this path
//  runner → worker   0:,     once: the application is loaded
//                    N:Status: 200 OK\nName: value\n\n…,  N:more body,  …  0:,  a response (CGI)
//                    0:!     in place of 0:, if the application failed: a 500, if no head was sent
//                    0:;     the response is complete, but 0:, comes later: close() has yet to run
//
//  N is the number of bytes up to the comma; len is empty if the client sent no Content-Length.
//  Any program that speaks this on its standard input and output is a runner.
//
//  The Python runner reads its requests from several pipes in turn. While it answers one, the next
//  may lie in the other pipes already, so that neither process has to sleep in between. Until the
//  runner has read a request, the worker can take it back and have another runner run it.
//
//  These pipes are a slot. With --threads N the Python runner has N slots, and a thread for each
//  runs the same loop; only the first slot reports, for all, that the application is loaded.
// ============================================================================
constexpr char kRunner[] = R"py(
import _thread, faulthandler, fcntl, importlib, io, os, select, sys
from _signal import *  # not signal, whose enums take time to make

class Gone(SystemExit): "The worker has closed the pipe: it has gone, or has no more requests."

def forgiving(method):
    def attempt(*text):  # a full disk must not make the application's print() fail
        try: return method(*text)
        except OSError: return len(text[-1]) if text else None
    return attempt

class Body(io.RawIOBase):
    """A request's body if not all of it came with the head; inert once the request is over."""
    readable = lambda self: True  # io.BufferedReader asks for this

    def __init__(self, response): self.response, self.size = response, response.slot.left

    def readinto(self, buffer):
        with self.response.lock:
            slot = self.response.slot
            data = slot.take(len(buffer)) if slot and slot.left else b""
        buffer[:len(data)] = data
        return len(data)

class Input(io.BufferedReader):
    def read(self, size=-1):  # the inherited one would allocate `size` bytes, however many
        return super().read(size if size is not None and 0 <= size <= self.raw.size else -1)

class Response:
    """start_response() and write() of one request; inert once it is over. A thread of the
    application may read, or write(), beside the request and after its end: hence the lock."""
    def __init__(self, slot):
        self.slot, self.head, self.started, self.lock = slot, None, False, _thread.RLock()

    def start_response(self, status, headers, exc_info=None):
        if exc_info and self.started: raise exc_info[1].with_traceback(exc_info[2])
        if self.head and not exc_info: raise AssertionError("start_response was called twice")
        head, fields = "", [("Status", status), *headers]
        for name, value in fields:
            if not isinstance(name, str) or not isinstance(value, str):
                raise TypeError("not a str in the status or the headers: %r" % ((name, value),))
            if ":" in name: raise ValueError("a colon in the header name %r" % name)
            head += f"{name}: {value}\n"
        if head.count("\n") != len(fields):
            raise ValueError("a line break in the status or the headers: %r" % head)
        self.head = head.encode("latin-1") + b"\n"
        return self.write

    def frame(self, items):
        """A netstring, in parts, of pieces of the body; the first has the head before them."""
        for item in items:
            if not isinstance(item, bytes):
                raise TypeError("the response is made of bytes, not %r" % type(item))
        if self.head is None: raise AssertionError("start_response was not called")
        if not self.started: items = [self.head, *items]
        self.started = True
        size = sum(map(len, items))
        return [b"%d:" % size, *items, b","] if size else []

    def write(self, data):
        with self.lock:
            if self.slot and self.slot.client_gone(): raise BrokenPipeError("the client has gone")
            if self.slot and data != b"":  # PEP 3333: no head before the first non-empty piece
                self.slot.write(self.frame([data]))

class Slot:
    """The pipes of a slot, and the loop that answers what comes through them."""
    failures = Exception  # what becomes a 500; anything else that is raised ends the process
    files = None          # with --reload: where to list the files of modules, and those listed
    most_parts = 1000 if hasattr(os, "writev") else 0  # below IOV_MAX; PyPy has no writev()

    def __init__(self, pipes, app):
        (*self.requests, self.replies), self.app = pipes, app
        self.index, self.pending = 0, b""  # the pipe of the present request; read, but not used

    def write(self, parts):
        try:
            sent = os.writev(self.replies, parts) if len(parts) <= self.most_parts else 0
            size = sum(map(len, parts))
            data = memoryview(b"".join(parts)) if sent < size else b""
            while sent < size: sent += os.write(self.replies, data[sent:])
        except BaseException:  # of a signal handler: after half a frame the pipe is of no use
            report()
            os._exit(1)

    def more(self):  # or nothing: for a moment take_back() in the worker sets O_NONBLOCK
        wait = [self.requests[self.index]], [], []
        if select.select.__module__ != "select": select.select(*wait)  # gevent's: others go on
        try: data = os.read(self.requests[self.index], 65536)
        except BlockingIOError: return select.select(*wait)
        if not data: raise Gone
        self.pending += data

    def netstring(self):
        while True:
            size, colon, rest = self.pending.partition(b":")
            if colon and len(rest) > int(size):
                self.pending = rest[int(size) + 1:]
                return rest[:int(size)]
            self.more()

    def take(self, size):  # some bytes of the body, `size` at most
        while not self.pending: self.more()
        data = self.pending[:min(size, self.left)]
        self.pending = self.pending[len(data):]
        self.left -= len(data)
        return data

    def client_gone(self):
        if not self.left and select.select([self.requests[self.index]], [], [], 0)[0]: self.more()
        return not self.left and self.pending == b"0:,"

    def serve(self, base):
        try:
            while True: self.serve_one(base)
        except Gone: pass

    def serve_one(self, base):
        block = self.netstring()
        if b"\0" not in block: return block and reopen(block)  # empty: a client left, too late
        words = iter(block.decode("latin-1").split("\0"))
        environ = base.copy()
        environ.update(zip(words, words))
        length = environ["CONTENT_LENGTH"] or environ.pop("CONTENT_LENGTH")  # where none was sent
        self.left, response = int(length or 0), Response(self)  # left: of the body, not read yet
        if self.left <= len(self.pending):
            environ["wsgi.input"] = io.BytesIO(self.take(self.left) if self.left else b"")
        else:
            environ["wsgi.input"] = Input(Body(response), 65536)
        self.answer(environ, response)
        self.pending, self.index = b"", (self.index + 1) % len(self.requests)
        if self.files: list_files(*self.files)

    def answer(self, environ, response):
        items, parts, mark = None, [], b"0:,"
        try:
            items = self.app(environ, response.start_response)
            rest = items if type(items) in (list, tuple) else []  # it is all there: one write
            for item in items if items is not rest else []:
                with response.lock:
                    if self.client_gone(): break
                    if item != b"": self.write(response.frame([item]))
            with response.lock:
                parts = response.frame(rest)
                if not hasattr(items, "close"): response.slot = None
                else: self.write([*parts, b"0:;"]), parts.clear()  # the client need not wait for it
        except Gone: raise
        except self.failures:
            report()
            parts, mark, response.slot = [], b"0:!", None
        finally:
            try:
                if hasattr(items, "close"): items.close()
            except self.failures: report()
        with response.lock:
            response.slot = None
            while self.left: self.take(65536)
        self.write(parts + [mark])  # last: from now on the worker may write to this pipe again

class file_wrapper:
    def __init__(self, filelike, blksize=8192):  # large blocks save time, but a pipe would wait
        self.blksize = max(blksize, 65536 * getattr(filelike, "seekable", bool)())
        self.filelike, self.close = filelike, getattr(filelike, "close", lambda: None)

    def __iter__(self): return iter(lambda: self.filelike.read(self.blksize) or b"", b"")

def list_files(list_fd, told, names=()):
    """With --reload: lists the files of all modules, and `names`, each once."""
    modules = list(sys.modules.values())  # __dict__ below: a module's __getattr__ must not run
    names = [*names, *(getattr(module, "__dict__", {}).get("__file__") for module in modules)]
    try:
        for name in filter(lambda name: isinstance(name, str) and name not in told, names):
            told.add(name)
            os.write(list_fd, os.fsencode(name) + b"\0")
    except OSError: report()

def report():
    error, text = sys.exc_info()[1], ""
    def trace(): import traceback; return traceback.format_exc()  # late, as the import takes time
    for tell in lambda: repr(error) + "\n", trace:
        try: text = tell()
        except Exception: pass  # the application's __repr__(), or no descriptor for the import
    forgiving(os.write)(2, text.encode("utf-8", "backslashreplace"))

def reopen(path):
    """Moves what is printed to the new error log."""
    try:
        with open(path, "ab", 0) as log:
            for fd in (1, 2): os.dup2(log.fileno(), fd)
    except OSError: report()

def main(name, paths, software, several, files, count, *fds):
    faulthandler.enable(2)  # SIGABRT and crashes print the stacks of all threads
    for file in sys.stdout, sys.stderr:  # -u would tear lines apart and mix them with others'
        getattr(file, "reconfigure", dict)(line_buffering=True, write_through=False)
        file.write, file.flush = forgiving(file.write), forgiving(file.flush)
    most = os.sysconf("SC_OPEN_MAX")
    high = min(1020 - len(fds), most // 2, most - 2 * len(fds))  # below FD_SETSIZE: for select()
    def raise_fd(fd):
        moved = fcntl.fcntl(int(fd), fcntl.F_DUPFD, high)
        os.set_inheritable(moved, False)  # PyPy has no F_DUPFD_CLOEXEC
        os.close(int(fd))
        return moved
    def cut_off():  # a child of the application must not use the bridge
        Slot.failures = Exception
        with open(os.devnull, "r+b", 0) as null:
            for fd in pipes: os.dup2(null.fileno(), fd, False)
    pipes = [raise_fd(fd) for fd in fds]
    stay, masks, names, threads = lambda *_: None, {}, [], []
    ours = SIGTERM, SIGHUP, SIGUSR1, SIGUSR2  # perhaps sent to all processes; the worker ends us
    def block(): masks[_thread.get_ident()] = pthread_sigmask(SIG_BLOCK, ours)
    def unblock(): pthread_sigmask(SIG_SETMASK, masks.pop(_thread.get_ident()))
    def restore(): [signal(number, SIG_DFL) for number in ours if getsignal(number) is stay]
    for number in ours: signal(number, stay), siginterrupt(number, False)
    os.register_at_fork(before=block, after_in_parent=unblock)
    for hook in restore, unblock, cut_off: os.register_at_fork(after_in_child=hook)  # each alone
    sys.path[:sys.path[0] == ""] = [os.getcwd()]  # "" would follow os.chdir()
    sys.path[:0] = [os.path.abspath(path) for path in paths.split(",") if path]
    try:  # MODULE, MODULE:OBJ.ATTR or MODULE:FACTORY(...), as in gunicorn
        path, _, target = name.partition(":")
        module = importlib.import_module(path)
        app = eval("module." + (target or "application"), dict(vars(module), module=module))
        if not callable(app): raise TypeError("%s is not callable" % name)
    except Exception as error:
        report()
        if not files: sys.exit(4)
        print("The application is loaded again when one of its files changes", file=sys.stderr)
        import traceback  # the worker wants a reload when one of these does
        names = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
        names, app = [*names, getattr(error, "filename", "")], None
    if files:
        Slot.files = raise_fd(files), set()
        list_files(*Slot.files, names)
    each = len(pipes) // int(count)
    slots = [Slot(pipes[i:i + each], app) for i in range(0, len(pipes), each)]
    base = {"wsgi.errors": sys.stderr, "wsgi.multithread": len(slots) > 1, "wsgi.run_once": False,
            "wsgi.file_wrapper": file_wrapper, "SERVER_SOFTWARE": software, "wsgi.version": (1, 0),
            "wsgi.multiprocess": bool(several), "wsgi.input_terminated": True}
    for slot in slots[1:]:
        import threading  # late, as it takes time, too
        Slot.failures = BaseException  # else sys.exit() would end this thread, or all of them
        threads.append(threading.Thread(target=slot.serve, args=(base,), daemon=True))
        threads[-1].start()
    if app is not None: slots[0].write([b"0:,"])
    slots[0].serve(base)
    for thread in threads: thread.join()
    if callable(getsignal(SIGTERM)): os.kill(os.getpid(), SIGTERM)  # for the application's handler

main(*map(os.fsdecode, settings))
)py";

/// `payload` as a frame, and then `rest`.
string netstring(string_view payload, string_view rest = "") {
    string text = to_string(payload.size()) + ":";
    text.reserve(text.size() + payload.size() + 1 + rest.size());
    ((text += payload) += ',') += rest;
    return text;
}

/// Parses the frames of a runner; how the bytes are split when they arrive makes no difference.
class NetstringReader {
public:
    enum class Event { NeedMore, Piece, Whole, End, Failed, Bad };

    /// Takes from the front of `in`. Piece: part of a payload, perhaps not all of it.
    Event next(string_view& in, string_view& piece) {
        while (!in.empty()) {
            const char c = in.front();
            piece = in.substr(0, static_cast<size_t>(std::min<uint64_t>(left_, in.size())));
            left_ -= piece.size();
            in.remove_prefix(std::max<size_t>(piece.size(), 1));
            if (!piece.empty()) { return Event::Piece; }
            if (std::exchange(in_payload_, false)) {
                const bool empty = std::exchange(size_, 0) == 0;
                if (empty && c == '!') { return Event::Failed; }
                if (empty && c == ';') { return Event::Whole; }
                if (c != ',') { return Event::Bad; }
                if (empty) { return Event::End; }
            } else if (c == ':' && digits_ > 0) {
                left_ = size_;
                in_payload_ = true;
                digits_ = 0;
            } else if (is_digit(c) && digits_++ < 12) {
                size_ = size_ * 10 + static_cast<uint64_t>(c - '0');
            } else {
                return Event::Bad;
            }
        }
        return Event::NeedMore;
    }

private:
    uint64_t size_ = 0, left_ = 0;
    int digits_ = 0;
    bool in_payload_ = false;
};

// Retired: gets no more requests, and leaves when idle. Hung: gets SIGABRT, then SIGKILL.
enum class Phase { Booting, Serving, Retired, Hung, Dying };

struct Connection;
struct Runner;

/// A request in a slot: the present one, or one that lies in a pipe ahead of time.
struct Job {
    Connection* client;  // null: nobody waits for the response any more
    size_t size;         // bytes of its frame and body, if all are in the pipe; else 0
    string request;      // its request line
};

/// The pipes through which a runner, or one of its threads, runs one request after the other.
struct Slot {
    Runner* runner = nullptr;
    std::vector<Pair> pipes;  // for requests, used in turn; take_back() needs the reading ends
    Fd replies;               // our end of the pipe for replies
    size_t index = 0;         // the pipe of the present request
    Fd full_pipe;             // while that pipe is full: a copy below FD_SETSIZE, for select()
    NetstringReader reader;
    Spool out;                    // what the runner has not taken yet of its request
    bool answered = false;        // the end frame of the present request has come
    bool tell_gone = false;       // the runner has to be told that the client has gone
    std::vector<Job> jobs;        // the present request, then those ahead, each in the next pipe
    Clock::duration mean{};       // how long a request takes
    size_t ahead_limit = 0;       // how many may lie ahead: about kAhead of work
    size_t ahead_bytes = kPiece;  // how large each of these may be
    Time since{};                 // when the present request went out
    Time deadline{};              // for the next frame, or for loading the application

    const Pair& pipe_of(size_t job) const { return pipes[(index + job) % pipes.size()]; }
    const Fd& pipe() const { return pipes[index].second; }
    bool busy() const { return !jobs.empty(); }
    Connection* current() const { return busy() ? jobs.front().client : nullptr; }

    void close_requests() {
        for (Pair& each : pipes) { each = Pair(); }
        full_pipe.reset();
    }
};

/// A runner process. It must not move in memory, for its slots point back to it.
struct Runner {
    Phase phase = Phase::Booting;
    pid_t pid = -1;
    std::vector<Slot> slots;
    bool new_log = false;          // it has to be told to reopen the error log
    Time kill_at = Time::max();    // when to call end_runner(), if it should leave
    int signal = 0;                // the last signal that we sent it
    bool dead = false;             // waitpid() has seen it, but its pipes may still hold replies
    int64_t left = INT64_MAX;      // requests until its successor is started
    Fd files;                      // with --reload: where it lists the files that it has loaded
    std::vector<int64_t> watched;  // the mtimes of these
    int64_t started = 0;           // an mtime from before it loaded any: the file system's clock

    string name() const { return "Runner (pid:" + to_string(pid) + ") "; }  // for logs

    bool busy() const {
        return find(slots, [](const Slot& slot) { return slot.busy(); }) != nullptr;
    }
};

/// Makes the pipes of a slot. Appends the runner's ends to `ends`: for requests, then for replies.
Error make_slot(const Config& config, Slot& slot, std::vector<Fd>& ends) {
    for (int i = 0; i < config.pipes; ++i) {
        Pair& pipe = slot.pipes.emplace_back();
        if (Error error = make_pipe(pipe)) { return error; }
        set_flags(pipe.second.get(), true);
        slot.ahead_bytes = std::min(slot.ahead_bytes, resize_pipe(pipe.first, kPiece));
        ends.push_back(raise_fd(Fd(::fcntl(pipe.first.get(), F_DUPFD_CLOEXEC, 0))));
        if (!ends.back()) { return os_error("cannot make a pipe"); }
        pipe = {raise_fd(std::move(pipe.first)), raise_fd(std::move(pipe.second))};
    }
    Pair replies;
    if (Error error = make_pipe(replies)) { return error; }
    (void)resize_pipe(replies.first, 1 << 18);
    set_flags(replies.first.get(), true);
    slot.replies = std::move(replies.first);
    if (slot.replies.get() >= FD_SETSIZE) { return {1, "too many descriptors for another runner"}; }
    ends.push_back(raise_fd(std::move(replies.second)));
    return {};
}

/// In a forked child: execs a program with the original limits and the default signal handling. But
/// it ignores what would stop it in the background when it prints (stty tostop) or reads; and
/// Python what may be sent to all processes, until kRunner handles that.
[[noreturn]] void exec_program(const Config& config, const Strings& words, bool is_python = false) {
    for (int number = 1; number < NSIG; ++number) { set_signals({number}, SIG_DFL); }
    set_signals({SIGTTOU, SIGTTIN}, SIG_IGN);
    if (is_python) { set_signals({SIGTERM, SIGHUP, SIGUSR1, SIGUSR2}, SIG_IGN); }
    set_soft_limit(config.soft_limit);
    block_signals(false);
    std::vector<const char*> pointers;
    for (const string& word : words) { pointers.push_back(word.c_str()); }
    pointers.push_back(nullptr);
    ::execvp(pointers[0], const_cast<char**>(pointers.data()));
    log(Level::Error, os_error("cannot run " + words[0]).text);
    ::_exit(kWorkerBootError);
}

/// In the forked child: execs the runner, which inherits its ends of the pipes and the error log
/// only. Python gets the pipes under other numbers than 0 and 1, lest what runs before our code
/// (sitecustomize) read or print there; another program as standard input and output.
[[noreturn]] void exec_runner(const Config& config, const std::vector<Fd>& ends, const string& boot,
                              pid_t worker) {
    ::setpgid(0, 0);  // Ctrl-C then spares it, and kill(-pid) ends what it forks, too
    const bool is_python = config.runner.empty();
    for (const Fd& end : ends) { ::fcntl(end.get(), F_SETFD, is_python ? 0 : FD_CLOEXEC); }
    const Fd null(::open("/dev/null", O_RDWR | O_CLOEXEC));
    const Fd& log_file = g_log.error_file;
    ::dup2((is_python ? null : ends[0]).get(), STDIN_FILENO);
    ::dup2((is_python ? log_file : ends[static_cast<size_t>(config.pipes)]).get(), STDOUT_FILENO);
    ::dup2(log_file.get(), STDERR_FILENO);
#ifdef __linux__
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
#endif
    if (::getppid() != worker) { ::_exit(0); }  // the worker died before that prctl()
    const string label = "server: runner [" + config.proc_name + "]";
    if (is_python) { exec_program(config, {config.python, "-u", "-c", boot, label}, true); }
    exec_program(config, {"/bin/sh", "-c", "exec " + config.runner});
}

/// Starts a runner. It loads the application when it has read kRunner and its settings, which are
/// left in `out` of its first slot.
Error start_runner(const Config& config, Runner& runner) {
    runner.slots = std::vector<Slot>(static_cast<size_t>(config.threads));
    std::vector<Fd> ends;
    for (Slot& slot : runner.slots) {
        slot.runner = &runner;
        if (Error error = make_slot(config, slot, ends)) { return error; }
    }
    if (config.reload) {
        if (Error error = make_temp_file(config.worker_tmp_dir, runner.files)) { return error; }
        struct stat info = {};
        ::fstat(runner.files.get(), &info);
        runner.started = nanoseconds(info.st_mtim);
    }
    const int list = runner.files.get();
    string source = kRunner;
    for (const string& setting :
         {config.app, to_string(config.pythonpath), string("server/") + kVersion,
          config.workers > 1 ? string("1") : "", config.reload ? to_string(list) : "",
          to_string(config.threads)}) {
        (source += '\0') += setting;
    }
    for (const Fd& end : ends) { (source += '\0') += to_string(end.get()); }
    const string boot = "b = open(" + to_string(ends[0].get()) + ", 'rb', closefd=False).read(" +
                        to_string(source.size()) +
                        ").split(b'\\0'); exec(compile(b[0], '<server runner>', 'exec'), "
                        "{'settings': b[1:]})";
    const pid_t worker = ::getpid();
    block_signals(true);  // in the child on_signal() would still write into our self-pipe
    runner.pid = ::fork();
    if (runner.pid == 0) {
        if (config.runner.empty() && config.reload) { ::fcntl(list, F_SETFD, 0); }
        exec_runner(config, ends, boot, worker);
    }
    block_signals(false);
    if (runner.pid < 0) { return os_error("cannot fork"); }
    ::setpgid(runner.pid, runner.pid);  // here too: kill(-pid) may come before the child runs
    if (config.runner.empty()) { runner.slots[0].out.append(source, source.size()); }
    return {};
}

/// "exited with status 1", "was ended by signal 9 (Killed), sent by this server".
string exit_text(int status, bool ours = false) {
    if (!WIFSIGNALED(status)) { return "exited with status " + to_string(WEXITSTATUS(status)); }
    const int number = WTERMSIG(status);
    return "was ended by signal " + to_string(number) + " (" + ::strsignal(number) + ")" +
           (ours ? ", sent by this server" : "");
}

// ============================================================================
//  9. Connection: what the worker knows of one client
//
//  ReadHead → ReadBody → Ready → Run → Reply → Linger → Done; a refused request goes straight
//  to Reply. Only Worker::set_state() changes the state; due() says how long each may last.
// ============================================================================
enum class Stop { No, Leave, Drain, Now };  // Leave: serve what is here; Drain: and in the queue
enum class State { ReadHead, ReadBody, Ready, Run, Reply, Linger, Done };

/// The part of a connection that goes through the ready queue as raw bytes. The steady clock shows
/// the same time in all processes.
struct Passport {
    Time accepted, started;            // of connecting; of the complete request, later of lingering
    State state = State::ReadHead;     // in the queue: at most Ready
    Time since{};                      // when that state began, or last made progress
    RequestParser::Framing framing{};  // parser.at; this and the next are for the queue only
    int64_t stored = 0;                // bytes of the body that are in its file
    int minor = 0;                     // HTTP/1.minor
    bool bodyless = false;             // HEAD, 204, 304: the response has no body
    bool sent_more = false, eof = false;  // the client has sent more than its request; half-closed
    bool said_close = false;              // its request said "Connection: close"
    bool awaits_proxy = false;            // a PROXY header may come first
    bool silent = true;                   // no byte of a request has come: perhaps a health check
};

struct Connection : Passport {
    explicit Connection(const Config& config) : parser(config) {}
    Fd socket;
    Endpoints ends;
    string from;   // the address of the socket's peer, whatever a PROXY header says
    string in;     // read, but not parsed yet
    string taken;  // of a head that is not complete: what has been parsed
    RequestParser parser;
    string env;             // environ block, once the head is complete
    Spool body, out;        // the request's body; what the client has not taken yet
    string app_head, head;  // of the response: from the application, to the client
    Response response;
    int64_t left = -1;       // of the response's Content-Length, still to come; -1: it has none
    int64_t body_bytes = 0;  // of the response's body, so far
    size_t head_counted = 0, reply_counted = 0;  // our part of Worker::head_memory_, reply_memory_
    bool chunked = false;                        // the response goes out in chunks
    bool complete = false, broken = false;  // nothing will follow `out`; it must end visibly cut

    /// Makes a datagram for the ready queue: passport, netstrings, body. An incomplete head goes as
    /// bytes, to be parsed anew. The socket and the body's file travel as descriptors.
    string pack() {
        framing = parser.at;
        stored = body.stored();
        const Passport pass = *this;
        string message(reinterpret_cast<const char*>(&pass), sizeof pass);
        for (const string* part : {&from, &ends.peer, &ends.peer_port, &ends.server,
                                   &ends.server_port, &env, &parser.request_line}) {
            message += netstring(*part);
        }
        return message + netstring(taken + in, body.newest());
    }

    void unpack(string_view message) {
        Passport pass;  // memcpy() onto the base itself could hit members in its tail padding
        std::memcpy(&pass, message.data(), sizeof pass);
        Passport::operator=(pass);
        message.remove_prefix(sizeof pass);
        for (string* part : {&from, &ends.peer, &ends.peer_port, &ends.server, &ends.server_port,
                             &env, &parser.request_line, &in}) {
            int64_t size = 0;
            parse_number(cut(message, ':'), size);
            *part = message.substr(0, static_cast<size_t>(size));
            message.remove_prefix(part->size() + 1);
        }
        body.append(message, message.size());
    }

    /// Memory for the head, which is there twice until it is complete: as bytes and parsed.
    size_t head_memory() const {
        return in.capacity() + taken.capacity() + parser.request.field_memory + env.capacity();
    }
};

constexpr size_t kMaxMessage = 4 * kPiece;

/// Sends or receives a datagram of the ready queue with two descriptors (SCM_RIGHTS). Returns its
/// size; -1, with errno, if the queue is full, or empty, or the datagram too large.
ssize_t exchange_message(const Fd& queue, bool send, char* data, size_t size, int (&fds)[2]) {
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof fds)] = {};
    struct iovec part = {data, size};
    struct msghdr message = {};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof fds);
    std::memcpy(CMSG_DATA(header), fds, sizeof fds);
    if (size > kMaxMessage) { return errno = EMSGSIZE, -1; }
    const ssize_t n = send ? ::sendmsg(queue.get(), &message, MSG_DONTWAIT)
                           : ::recvmsg(queue.get(), &message, MSG_DONTWAIT);
    if (!send && n >= 0) { std::memcpy(fds, CMSG_DATA(header), sizeof fds); }
    return n;
}

// ============================================================================
//  10. Worker: one select loop between clients, the ready queue and the runner
//
//  Only select() ever waits for a client or an application, so that a slow one delays no other.
//  The members stand at the end of the class.
// ============================================================================
constexpr auto kGather = 1200ms;     // from a worker's wish for a reload to it: others follow
constexpr auto kTick = 100ms;        // how precise deadlines are
constexpr auto kColdDelay = 20ms;    // how long select() may ignore clients silent for a tick
constexpr auto kAcceptDelay = 10ms;  // how long a busy worker leaves connections to idle ones
constexpr auto kAhead = 1ms;         // how long a request may lie ahead in a busy runner's pipe
constexpr auto kKillDelay = 500ms;   // from asking a process to leave to SIGKILL
constexpr auto kLingerSilence = 5s, kLingerTotal = 30s;  // as nginx's lingering_close
constexpr auto kSendSilence = 60s;  // or --timeout if longer: ACKs of slow readers come in bursts
constexpr size_t kReplyMemory = size_t{1} << 20, kWorkerMemory = size_t{16} << 20;  // bytes
#ifdef MSG_MORE
constexpr int kMore = MSG_MORE;  // the last bytes wait to share a segment with the FIN
#else
constexpr int kMore = 0;
#endif

class Worker {
public:
    /// `queue`, the ready queue, is shared by the workers of all generations.
    Worker(const Config& config, std::list<Listener>& listeners, const Pair& queue, const Fd& tmp,
           pid_t arbiter)
        : config_(config), listeners_(listeners), queue_(queue), tmp_(tmp), arbiter_(arbiter) {}

    /// Serves until it is told to stop; returns the exit status.
    int run() {
        if (Error error = init_process()) {
            log(Level::Error, "Worker cannot boot: " + error.text);
            return kWorkerBootError;
        }
        while (status_ == 0 && (!runners_.empty() || has_work())) { turn(); }
        log(Level::Info, "Worker exiting (pid: " + to_string(::getpid()) + ")");
        return status_;
    }

private:
    // --- life -------------------------------------------------------------------------------

    /// After the fork: sets up signals, environment and user, and starts the first runner.
    Error init_process() {
        log(Level::Info, "Booting worker with pid: " + to_string(::getpid()));
        set_title(config_, "worker");
#ifdef M_TRIM_THRESHOLD  // else free() gives pages back that the next piece of a body faults in
        ::mallopt(M_TRIM_THRESHOLD, 1 << 20);
#endif
        if (Error error = make_pipe(g_self_pipe, true)) { return error; }
        set_signals({SIGHUP, SIGTTIN, SIGTTOU, SIGPIPE, SIGXFSZ}, SIG_IGN);
        set_signals({SIGTERM, SIGUSR1, SIGUSR2, SIGINT, SIGQUIT, SIGWINCH, SIGCHLD}, on_signal);
        block_signals(false);
        for (const char* name :
             {"SERVER_UPGRADE", "SERVER_SOCKETS", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES",
              "LISTEN_PIDFDID", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"}) {
            ::unsetenv(name);  // meant for the master only, not for programs of the application
        }
        // As gunicorn does: without it web.py takes this for a trial and shows clients tracebacks.
        ::setenv("SERVER_SOFTWARE", (string("server/") + kVersion).c_str(), 1);
        for (const string& pair : config_.raw_env) { ::putenv(const_cast<char*>(pair.c_str())); }
        ::tzset();  // -e may have set TZ, at which localtime_r() need not look
        if (Error error = drop_privileges(config_)) { return error; }
        ::srandom(static_cast<unsigned>(::getpid()));
        return boot_runner();
    }

    /// The heartbeat: any change of the file's mode moves its ctime, which the arbiter reads. Bits
    /// of the mode: 0001 alternates; 0002: booted; 0174: counts wishes for a reload.
    void notify() {
        spinner_ = !spinner_;
        const int mode = wishes_ % 32 * 4 + (booted_ ? 2 : 0) + (spinner_ ? 1 : 0);
        ::fchmod(tmp_.get(), static_cast<mode_t>(mode));
        next_notify_ = now_ + (config_.timeout == 1s ? 500ms : 1000ms);
    }

    void ask_reload() { ++wishes_, notify(); }

    /// Whether a runner is still needed.
    bool has_work() const {
        return stop_ < Stop::Leave ||
               (stop_ < Stop::Now && (connected_ > 0 || !listeners_.empty() ||
                                      (stop_ == Stop::Drain && is_ready(queue_.second))));
    }

    void handle_signals() {
        for (int number; (number = next_signal()) >= 0;) {
            if (number == SIGCHLD) { reap_runners(); }
            if (number == SIGUSR1) { reopen_logs(); }
            if (number == SIGTERM) { stop(Stop::Leave); }
            if (number == SIGUSR2) { stop(Stop::Drain); }
            const bool relieved = number == SIGWINCH && config_.daemon && stop_ == Stop::Drain;
            if (relieved) { stop_ = Stop::Leave, listeners_.clear(); }
            if (number == SIGINT || number == SIGQUIT) { stop(Stop::Now); }
        }
    }

    void reopen_logs() {
        if (Error error = open_logs(config_)) {
            const bool denied = errno == EACCES;  // to --user, not to root
            if (!denied) { return log(Level::Error, error.text); }
            log(Level::Info, error.text + ": new workers inherit it");
            return ask_reload();
        }
        logs_access_ = true;
        for (Runner& runner : runners_) {
            runner.new_log = config_.errorlog != "-" && config_.runner.empty();
            tell_log(runner);
        }
    }

    /// Tells a runner to reopen the error log, when it is idle and will read that.
    void tell_log(Runner& runner) {
        Slot& slot = runner.slots[0];
        if (!runner.new_log || slot.busy() || runner.phase != Phase::Serving) { return; }
        runner.new_log = false;
        slot.out.append(netstring(config_.errorlog), kReplyMemory);
        feed_runner(slot);
    }

    /// Begins to stop. Unless `how` is Now, first accepts what waits in the kernel's backlog.
    void stop(Stop how) {
        if (stop_ == Stop::No) { stopped_ = now_; }
        stop_ = std::max(stop_, how);
        if (booted_ && stop_ != Stop::Now) { empty_backlog(); }
        if (!booted_ || stop_ != Stop::Drain) { listeners_.clear(); }  // others accept the rest
        next_tick_ = now_;  // to dismiss the runner at once if there is nothing to do
    }

    /// The graceful timeout is over: clients still here get a 503 or, within a response, no more.
    void give_up() {
        log(Level::Warning, "The graceful timeout is over");
        each_slot([this](Slot& slot) {
            take_back(slot);
            for (Job& job : slot.jobs) { job.client = nullptr; }
        });
        do {
            for (const auto& c : connections_) {
                if (!c || c->state >= State::Linger) { continue; }
                if (c->response.status != 0) { log_about(*c, Level::Warning, "Cut off"); }
                end_response(*c, false, {503, "the graceful timeout is over"});
                if (c && c->state == State::Reply) { finish(*c), settle(*c); }  // it reads slowly
            }
        } while (stop_ == Stop::Drain && dequeue());
        stop(Stop::Now);
    }

    /// When stopping: accepts what waits at the listeners, then closes them; without room for it,
    /// goes on later. At most --backlog from each: new clients may keep coming for ever.
    void empty_backlog() {
        for (; stop_ != Stop::No && !listeners_.empty(); listeners_.pop_back(), closed_ = 0) {
            for (accept_again_ = now_; closed_ < config_.backlog; ++closed_) {
                if (!accept_client(listeners_.back())) { break; }
            }
            if (accept_again_ > now_) { return; }  // no room: turn() calls this again
        }
    }

    // --- the loop ---------------------------------------------------------------------------

    /// One select(), and the work that it brings. Of many clients, those that have been silent for
    /// a tick are looked at only every kColdDelay: select() takes time for each in its set.
    void turn() {
        const bool leave_out = connected_ > 64 && now_ < hot_until_;
        fd_set reads = leave_out ? hot_ : reads_, writes = writes_;
        const bool all = std::memcmp(&reads, &reads_, sizeof reads) == 0;  // none is left out
        show_title();
        const Time until = prepare(reads, writes);
        wait_ready(max_fd_, reads, writes, all ? until : std::min(until, hot_until_));
        const Time before = now_, woken = now_ = Clock::now();
        if (all) { hot_until_ = now_ + kColdDelay; }
        const auto is_set = [](const Fd& fd, const fd_set& set) {
            return fd && FD_ISSET(fd.get(), &set);
        };
        if (is_set(g_self_pipe.first, reads)) { handle_signals(); }
        if (woken > before + 1500ms) {  // no sleep is that long: we, or all, have been stopped
            thawed_ = woken, stopped_ += woken - before;
        }
        each_slot([&](Slot& slot) {
            if (is_set(slot.full_pipe, writes)) { feed_runner(slot); }
            if (is_set(slot.replies, reads)) { read_runner(slot); }
            if (now_ >= take_back_at(slot)) { take_back(slot); }
        });
        check_queue_ = check_queue_ || is_set(queue_.second, reads) || now_ >= next_tick_;
        for (int fd = 0; fd <= max_fd_; ++fd) {
            const bool readable = FD_ISSET(fd, &reads), writable = FD_ISSET(fd, &writes);
            Connection* c = readable || writable ? connections_[fd].get() : nullptr;
            if (c == nullptr) { continue; }
            if (writable) { flush(*c); }
            if (readable && c->state != State::Done) { read_client(*c); }
            settle(*c);
        }
        const bool called =
            find(listeners_, [&](const Listener& each) { return is_set(each.fd, reads); });
        const bool busy = !has_idle_slot();
        if (client_waits_ && now_ >= next_look_) {
            client_waits_ = false, next_look_ = now_ + kAcceptDelay;
            if (busy) { accept_clients(); }
        } else if (called && busy) {
            client_waits_ = true, next_look_ = now_ + kAhead;
        }
        run_requests();
        if (called && !client_waits_ && last_accept_ < woken) { came_too_late(woken); }
        pass_on();
        if (now_ >= accept_again_) { empty_backlog(); }
        if (now_ >= next_tick_) { tick(); }
    }

    /// Woken for a client that another worker has accepted. If that happens twice within 1 ms, the
    /// others suffice: to save needless wake-ups, ignores the listeners for kAcceptDelay.
    void came_too_late(Time woken) {
        if (woken < std::exchange(lost_at_, woken) + 1ms) { accept_again_ = woken + kAcceptDelay; }
    }

    /// What ps shows of this process; without query strings, in which there may be secrets.
    void show_title() {
        string_view title = "idle ";
        each_slot([&](const Slot& slot) {
            if (slot.busy()) { title = slot.jobs.front().request; }
        });
        title = title.substr(0, std::min(title.find('?'), title.rfind(' ')));
        if (booted_ && title != shown_) { set_title(config_, "worker", shown_ = title); }
    }

    /// Adds to the sets all that is no client, and returns the time by which select() must return.
    Time prepare(fd_set& reads, fd_set& writes) {
        const bool idle = has_idle_slot(), at_once = idle && !ready_.empty();  // see run_requests()
        Time until = at_once ? now_ : std::min(next_tick_, pass_at());
        watch(g_self_pipe.first, reads);
        each_slot([&](Slot& slot) {
            if (slot.full_pipe) { watch(slot.full_pipe, writes); }
            const bool stalled = slot.current() != nullptr && slot.current()->out.full();
            if (stalled) { slot.deadline = patience(now_); }  // the client's fault: it reads slowly
            if (!slot.replies || stalled) { return; }
            watch(slot.replies, reads);
            until = std::min(until, take_back_at(slot));
        });
        const bool room = connected_ <= config_.worker_connections;
        if (places() > 0 && room && stop_ != Stop::Leave) { watch(queue_.second, reads); }
        // A busy worker leaves connections to idle ones: it watches the listeners only once in
        // kAcceptDelay, and then accepts only what still waits after kAhead.
        const Time busy_at =
            client_waits_ ? next_look_ : std::max(next_look_, last_begin_ + kAcceptDelay);
        const Time accept_at = std::max(accept_again_, idle ? now_ : busy_at);
        for (const Listener& each : listeners_) {
            if (booted_ && stop_ == Stop::No && now_ >= accept_at) { watch(each.fd, reads); }
        }
        return booted_ && now_ < accept_at ? std::min(until, accept_at) : until;
    }

    void watch(const Fd& fd, fd_set& set, bool wanted = true) {
        wanted ? FD_SET(fd.get(), &set) : FD_CLR(fd.get(), &set);
        max_fd_ = std::max(max_fd_, fd.get());
    }

    /// Gives the runners as much work as they may have, and does without select() while they answer
    /// at once.
    void run_requests() {
        for (int round = 0; round < 8; ++round) {
            if (std::exchange(check_queue_, false)) { take_from_queue(); }
            dispatch();
            if (stop_ == Stop::No && wants_request()) { accept_clients(); }
            Slot* slot = nullptr;  // whose request went out just now
            each_slot([&](Slot& each) { slot = each.busy() && each.since == now_ ? &each : slot; });
            if (slot == nullptr || !yield_to(*slot)) { return; }
        }
    }

    /// Yields the processor instead of sleeping: to a runner whose pipes are all full, which then
    /// answers many requests for one wake-up; or for a single client, as to be woken takes longer.
    /// Programs that compute get a time slice by it, too: after a yield that was longer than a
    /// runner's usual share there is none for fifty times as long. Returns whether it has answered.
    bool yield_to(Slot& slot) {
        const bool full = slot.jobs.size() > 1 && slot.jobs.size() == slot.pipes.size();
        int tries = full ? 3 : connected_ == 1 ? 40 : 0;
        for (; tries > 0 && slot.replies && now_ >= yield_again_; --tries) {
            ::sched_yield();
            const Time before = std::exchange(now_, Clock::now());
            if (now_ > before + (full ? 5ms : 1ms)) { yield_again_ = now_ + 50 * (now_ - before); }
            if (read_runner(slot)) { return true; }
        }
        return false;
    }

    /// Every kTick, or once a second when idle: heartbeat, deadlines, runners.
    void tick() {
        if (::getppid() != arbiter_) { stop(Stop::Now); }
        const auto grace = std::max<Clock::duration>(config_.graceful_timeout, 2 * kTick);
        const bool over = stop_ != Stop::No && stop_ != Stop::Now && now_ >= stopped_ + grace;
#ifndef __APPLE__  // whose kernel may shut the reading side of a socket while it is in a message
        // Not behind requests in the queue, where nobody would read on; when time is over, even so.
        if (stop_ == Stop::Leave && (over || !is_ready(queue_.second))) { pass_on_readers(); }
#endif
        if (over) { give_up(); }
        if (now_ >= next_notify_) {
            notify();
            if (config_.reload) { watch_files(); }
        }
        hot_ = std::exchange(fresh_, fd_set{});
        for (const auto& c : connections_) {
            if (!c || now_ < due(*c)) { continue; }
            if (c->state <= State::ReadBody) { read_client(*c); }  // it may have come in time
            if (now_ >= due(*c)) { expire(*c); }
            settle(*c);
        }
        tick_runners();
        const bool idle =
            connected_ == 0 && runners_.size() == 1 && has_idle_slot() && !runners_.front().busy();
        next_tick_ = idle ? next_notify_ : now_ + kTick;
    }

    /// Ends hung slots and runners that should have left, and starts another if one is needed.
    void tick_runners() {
        const Time anew = patience(thawed_);  // they may have been stopped together with us
        each_slot([&](Slot& slot) {
            if (!slot.full_pipe) { feed_runner(slot); }  // in case there was no descriptor for it
            if (slot.busy() && now_ >= std::max(slot.deadline, anew)) { hung_app(slot); }
        });
        const bool done = !has_work();
        if (done && stop_ == Stop::Drain) { stop_ = Stop::Leave; }  // the queue is for others now
        for (Runner& runner : runners_) {
            Time& late = runner.slots[0].deadline;
            if (runner.phase == Phase::Booting && now_ >= std::max(late, anew)) {
                late = Time::max();
                log(Level::Warning, runner.name() + "still loads the application");
            }
            const auto awaited = [](const Slot& slot) { return slot.current() != nullptr; };
            const bool over = runner.phase == Phase::Hung && !find(runner.slots, awaited);
            if (over || now_ >= runner.kill_at) { end_runner(runner); }
            if (done || (runner.phase == Phase::Retired && !runner.busy())) { dismiss(runner); }
        }
        // A runner that has had its --max-requests serves on until its successor is ready.
        const bool alone = runners_.size() == 1;  // never start a third
        const auto stays = [alone](const Runner& each) {
            const bool spent = each.phase == Phase::Serving && each.left <= 0;
            return each.phase != Phase::Retired && !(alone && (spent || each.phase == Phase::Hung));
        };
        if (!find(runners_, stays) && now_ >= restart_at_ && has_work()) {
            if (Error error = boot_runner()) { log(Level::Error, error.text); }
        }
    }

    /// To be called after any event of a connection: updates sets and sums, or deletes it if Done.
    void settle(Connection& c) {
        const bool done = c.state == State::Done;
        const size_t heads = done ? 0 : c.head_memory(), replies = done ? 0 : c.out.allocated();
        head_memory_ += heads - std::exchange(c.head_counted, heads);
        reply_memory_ += replies - std::exchange(c.reply_counted, replies);
        for (fd_set* set : {&reads_, &hot_, &fresh_}) { watch(c.socket, *set, !done && !c.eof); }
        watch(c.socket, writes_, !done && c.out.size() > 0);
        if (!done) { return; }
        if (stop_ != Stop::No) { accept_again_ = now_; }  // empty_backlog() has room again
        --connected_;
        connections_[c.socket.get()].reset();
    }

    /// The deadline for the next sign of life after the one at `since`.
    Time patience(Time since) const {
        return config_.timeout > 0s ? since + config_.timeout : Time::max();
    }

    /// The deadline of a connection in its present state.
    Time due(const Passport& c) const {
        switch (c.state) {
            case State::ReadHead:  // when we stop, a silent client's request may be on its way
                return c.silent && stop_ == Stop::Drain ? std::max(c.accepted, stopped_) + 1s
                                                        : c.accepted + config_.header_timeout;
            case State::ReadBody: return patience(c.since);
            case State::Ready: return patience(std::max(c.started, thawed_));
            case State::Reply:  // even with -t 0, lest those who read nothing fill the worker
                return c.since + std::max<Clock::duration>(config_.timeout, kSendSilence);
            case State::Linger: return std::min(c.since + kLingerSilence, c.started + kLingerTotal);
            case State::Run:  // the slot has a deadline
            case State::Done: break;
        }
        return Time::max();
    }

    void set_state(Connection& c, State state) {
        if (c.state == State::Ready) { ready_.erase(std::find(ready_.begin(), ready_.end(), &c)); }
        if (state == State::Ready) { ready_.push_back(&c); }
        c.state = state;
        c.since = now_;
    }

    void expire(Connection& c) {
        switch (c.state) {
            case State::ReadHead: return refuse(c, {408, "the head of the request took too long"});
            case State::ReadBody: return refuse(c, {408, "the body of the request stopped coming"});
            case State::Ready: return refuse(c, {503, "no runner was to be had"});
            case State::Reply:
                if (c.out.size() == 0) { return set_state(c, State::Reply); }  // it has taken all
                log_about(c, Level::Info, "The client took nothing");
                return client_gone(c);
            case State::Linger: return set_state(c, State::Done);
            case State::Run:
            case State::Done: return;
        }
    }

    // --- clients ----------------------------------------------------------------------------

    /// Accepts some clients from each listener; but, if the runners want requests, only as many as
    /// they want: the rest is for the other workers.
    void accept_clients() {
        const bool wanted = wants_request();
        for (size_t n = listeners_.size(); n > 0 && now_ >= accept_again_; --n) {
            const Listener& listener = listeners_.front();  // which becomes the last: each in turn
            listeners_.splice(listeners_.end(), listeners_, listeners_.begin());
            for (int i = 0; i < 16 && (!wanted || wants_request()); ++i) {
                if (!accept_client(listener)) { break; }
                dispatch();
            }
        }
    }

    /// Accepts one client. False: none waits at this listener; or there is no room for it, and all
    /// listeners are ignored for kTick, as the loop would spin while they stay readable.
    bool accept_client(const Listener& listener) {
        const bool full = connected_ >= config_.worker_connections;
        if (full && !is_ready(listener.fd)) { return false; }
        if (full && !shed()) { return accept_again_ = now_ + kTick, false; }
        sockaddr_storage peer{};
        socklen_t size = sizeof peer;
        const auto address = reinterpret_cast<sockaddr*>(&peer);
#ifdef SOCK_CLOEXEC
        Fd fd(::accept4(listener.fd.get(), address, &size, SOCK_CLOEXEC | SOCK_NONBLOCK));
#else
        Fd fd(::accept(listener.fd.get(), address, &size));
        if (fd && size == 0) { fd.reset(), errno = ECONNABORTED; }  // macOS: reset by its client
        if (fd) { set_flags(fd.get(), true); }
#endif
        const bool short_of =
            errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM;
        if (!fd && !short_of) { return !would_block(); }  // else one connection failed: go on
        if (!fd) {
            const Error error = os_error("cannot accept");
            if (!is_ready(listener.fd)) { return false; }  // EMFILE comes even if no client waits
            log(Level::Error, error.text), shed();
            return accept_again_ = now_ + kTick, false;
        }
        Connection* c = adopt(std::move(fd));
        if (c == nullptr) { return false; }
        address_text(peer, c->ends.peer, c->ends.peer_port);
        c->from = c->ends.peer;
        c->awaits_proxy = config_.proxy_protocol;
        c->ends.server = listener.host;
        c->ends.server_port = listener.port;
        if (listener.wildcard) {
            address_text(socket_name(c->socket.get()), c->ends.server, c->ends.server_port);
        }
        last_accept_ = c->accepted = c->started = now_;
        set_state(*c, State::ReadHead);
        read_client(*c);
        settle(*c);
        return true;
    }

    /// Makes a connection of a socket; or closes it and returns null if its number is too high for
    /// select(), as FD_SET() would write past the end of the set.
    Connection* adopt(Fd fd) {
        const int number = fd.get();
        if (number < 0 || number >= FD_SETSIZE) { return nullptr; }
        connections_[number] = std::make_unique<Connection>(config_);
        connections_[number]->socket = std::move(fd);
        ++connected_;
        next_tick_ = std::min(next_tick_, now_ + kTick);
        return connections_[number].get();
    }

    /// Makes room for one more client: drops the oldest that lingers or, if none does, the oldest
    /// whose request is unfinished or who has taken nothing for --timeout. False: all are being
    /// served, or bytes unread until now complete the request of the one chosen.
    bool shed() {
        const auto rank = [](const Connection& c) {
            return std::make_pair(c.state != State::Linger, c.accepted);
        };
        Connection* victim = nullptr;
        for (const auto& c : connections_) {
            if (!c) { continue; }
            const bool stuck =
                c->state == State::Reply && c->out.size() > 0 && now_ >= patience(c->since);
            if (!stuck && c->state != State::Linger && c->state > State::ReadBody) { continue; }
            if (victim == nullptr || rank(*c) < rank(*victim)) { victim = c.get(); }
        }
        if (victim == nullptr) { return false; }
        read_client(*victim);
        if (victim->state <= State::ReadBody) {
            refuse(*victim, {503, "too many connections"});
            (void)!::read(victim->socket.get(), buffer_, kPiece);  // or close() sends a reset
        }
        if (victim->state >= State::Reply) { expire(*victim); }
        const bool gone = victim->state == State::Done;
        settle(*victim);
        return gone;
    }

    /// Reads once from a client. What the bytes mean depends on the connection's state.
    void read_client(Connection& c) {
        const ssize_t n = ::read(c.socket.get(), buffer_, kPiece);
        if (n < 0) { return would_block() ? void() : client_gone(c); }
        c.eof = n == 0;  // a half-close: the client can still read
        if (c.state <= State::ReadBody) {
            return parse(c, string_view(buffer_, static_cast<size_t>(n)));
        }
        c.sent_more = c.sent_more || n > 0;
        if (c.state == State::Linger) { set_state(c, c.eof ? State::Done : State::Linger); }
    }

    /// Parses what was left over in c.in, and then `fresh`, and acts on it.
    void parse(Connection& c, string_view fresh) {
        if (!c.in.empty()) { fresh = c.in += fresh; }
        string_view in = fresh, piece;
        Parse parsed = c.awaits_proxy ? take_proxy(c, in) : Parse::Head;
        fresh = in;  // without the PROXY header
        c.silent = c.silent && in.empty();
        while (parsed == Parse::Head || parsed == Parse::Data) {
            parsed = c.parser.next(in, piece);
            if (parsed == Parse::Head) { take_head(c); }
            if (parsed == Parse::Data) { c.body.append(piece, kPiece); }
            if (c.state > State::ReadBody) { return; }
        }
        if (parsed == Parse::Bad) { return refuse(c, c.parser.error); }
        if (c.state == State::ReadHead) { c.taken += fresh.substr(0, fresh.size() - in.size()); }
        c.in = string(in);
        if (refuse_large(c, c.state == State::ReadHead ? c.head_memory() : c.in.size())) { return; }
        if (too_large(c.body.size())) { return refuse(c, {413, "the body is too large"}); }
        if (c.body.failed()) {
            return refuse(c, {507, os_error("no room on disk for the body").text});
        }
        if (parsed == Parse::Done) { return ready(c); }
        if (c.eof) { return refuse(c, {400, "the request ends early"}); }
        c.since = now_;
    }

    /// Refuses a head, or a line in a body, above 64 KiB while all heads take above kWorkerMemory.
    bool refuse_large(Connection& c, size_t held) {
        const bool large = held > kPiece && head_memory_ > kWorkerMemory;
        if (large) { refuse(c, {503, "no memory for so large a head"}); }
        return large;
    }

    /// The PROXY header that may stand before a request. Head: the request begins.
    Parse take_proxy(Connection& c, string_view& in) {
        Endpoints said = c.ends;
        string_view rest = in;
        const Parse parsed = take_proxy_header(rest, said);
        if (rest.size() < in.size() && !is_listed(config_.proxy_allow_from, c.from)) {
            return c.parser.error = {403, "who sent a PROXY header may not"}, Parse::Bad;
        }
        if (parsed == Parse::Bad) { c.parser.error = {400, "not a PROXY header"}; }
        if (parsed != Parse::Done) { return parsed; }
        in = rest;
        c.ends = said;
        c.awaits_proxy = false, c.silent = true;
        return Parse::Head;
    }

    void take_head(Connection& c) {
        const bool https =
            c.parser.request.says_https > 0 && is_listed(config_.forwarded_allow_ips, c.from);
        if (https && c.parser.request.says_http > 0) {
            return refuse(c, {400, "contradicting X-Forwarded fields"});
        }
        const Request request = std::exchange(c.parser.request, Request());  // c.env replaces it
        c.minor = request.minor;
        c.bodyless = request.method == "HEAD";
        c.said_close = same_name(request.field("HTTP_CONNECTION"), "close");
        c.env = make_environ(request, c.ends, https ? "https" : "http");
        if (g_log.level == Level::Debug) { log(Level::Debug, escape(c.parser.request_line)); }
        discard(c.taken);
        set_state(c, State::ReadBody);
        if (refuse_large(c, c.env.size())) { return; }
        if (too_large(request.length)) { return refuse(c, {413, "the body is too large"}); }
        if (request.expect_continue && (c.parser.at.chunked || request.length > 0)) {
            c.out.append("HTTP/1.1 100 Continue\r\n\r\n", kReplyMemory);
            flush(c);
        }
    }

    bool too_large(int64_t body) const {
        return config_.limit_request_body > 0 && body > config_.limit_request_body;
    }

    /// The request is complete, and waits until dispatch() gives it to a runner.
    void ready(Connection& c) {
        if (c.parser.at.chunked) {
            c.env.insert(sizeof "CONTENT_LENGTH", to_string(c.body.size()));
        }
        c.sent_more = !c.in.empty();
        discard(c.in);
        c.started = now_;
        set_state(c, State::Ready);
    }

    /// Answers with an error page; or closes in silence, if the client has not sent anything.
    void refuse(Connection& c, const Error& error) {
        if (c.silent) { return set_state(c, State::Done); }
        const bool by_client = error.code < 500 || error.code == 501 || error.code == 505;
        log_about(c, by_client ? Level::Warning : Level::Error,
                  to_string(error.code) + " to " + c.ends.peer + ": " + error.text);
        c.minor = std::max(c.minor, c.parser.request.minor);  // the head may not be complete
        c.bodyless = c.bodyless || c.parser.request_line.find("HEAD ") == 0;
        discard(c.in), discard(c.taken);
        c.parser.request = Request();
        string body;
        c.response = error_response(error.code, body);
        c.head = final_head(c.response, c.minor, false);
        if (c.bodyless) { body.clear(); }
        c.body_bytes = static_cast<int64_t>(body.size());
        c.out.append(c.head + body, kReplyMemory);
        c.sent_more = c.sent_more || c.state < State::Ready;
        c.complete = true;
        set_state(c, State::Reply);
        flush(c);
    }

    /// Sends what there is; ends the response once all of it has gone.
    void flush(Connection& c) {
        while (c.out.size() > 0) {
            const string_view data = c.out.front();
            const bool last = c.complete && !c.sent_more && !c.broken;
            const ssize_t n = ::send(c.socket.get(), data.data(), data.size(), last ? kMore : 0);
            if (n < 0) { return would_block() ? void() : client_gone(c); }
            c.out.pop(static_cast<size_t>(n));
            c.since = now_;
        }
        if (c.complete && c.state == State::Reply) { finish(c); }
    }

    /// All has been sent. close() with unread bytes resets the connection, and the client could
    /// lose the end of the response: then half-close, and read on (RFC 9112 section 9.6). It comes
    /// before the look for such bytes, since it pushes out what kMore holds back. A client that
    /// said "Connection: close" sends no more: close() alone does, and saves two system calls.
    void finish(Connection& c) {
        write_access(c);
        discard(c.env);
        if (c.broken && !c.chunked && c.left < 0 && !c.bodyless) {
            const struct linger reset = {1, 0};  // without length or chunks, a FIN would look whole
            ::setsockopt(c.socket.get(), SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
            return set_state(c, State::Done);
        }
        if (c.said_close && !c.sent_more) { return set_state(c, State::Done); }
        char byte;
        ::shutdown(c.socket.get(), SHUT_WR);
        c.sent_more = c.sent_more || ::recv(c.socket.get(), &byte, 1, MSG_PEEK | MSG_DONTWAIT) > 0;
        c.started = now_;
        set_state(c, c.sent_more && !c.eof ? State::Linger : State::Done);
    }

    /// After a reset or a failed write: there is nobody to answer.
    void client_gone(Connection& c) {
        if (c.state != State::Linger && !c.silent) { write_access(c); }
        each_slot([&](Slot& slot) {
            const auto mine = [&c](const Job& job) { return job.client == &c; };
            if (slot.current() == &c) { return abandon(slot); }
            if (Job* job = find(slot.jobs, mine)) { job->client = nullptr; }
        });
        set_state(c, State::Done);
    }

    static void log_about(const Connection& c, Level level, const string& what) {
        log(level, what + ": " + escape(c.parser.request_line));
    }

    void write_access(const Connection& c) {
        if (!g_log.access_file) { return; }
        const int64_t bytes = std::max<int64_t>(c.body_bytes - c.out.size(), 0);  // sent, roughly
        const auto took = std::chrono::ceil<microseconds>(Clock::now() - c.started);
        const int status = c.response.status != 0 ? c.response.status : 499;  // nginx: client left
        const Access access{c.env, c.head, c.parser.request_line, c.ends.peer, status, bytes, took};
        const char* start = logs_access_ ? "" : "\n";  // the last line may be incomplete
        const bool good =
            write_all(g_log.access_file, start + access_line(config_.access_log_format, access));
        if (std::exchange(logs_access_, good) && !good) {
            log(Level::Error, os_error("cannot write the access log").text);
        }
    }

    // --- the ready queue --------------------------------------------------------------------

    /// When the oldest request here goes to the queue: 1 ms after it came or a runner last began
    /// another, whichever is later, but within 10 ms. A queue that was full is left alone for 10
    /// ms.
    Time pass_at() const {
        if (ready_.empty()) { return Time::max(); }
        const Time since = ready_.front()->started;
        const Time quick = std::max(since, std::min(last_begin_, since + 9ms)) + 1ms;
        return std::max(queue_again_, quick);
    }

    /// Sends a connection through the queue to whichever worker takes it. False: it stays here.
    bool enqueue(Connection& c) {
        const size_t head = c.env.size() + c.taken.size() + c.in.size();
        string message = head > kMaxMessage ? string() : c.pack();  // too large: EMSGSIZE below
        const size_t size = std::max(head, message.size());
        const int socket = c.socket.get(), file = c.body.file().get();
        int fds[] = {socket, file < 0 ? socket : file};  // always two, if need be the same
        if (exchange_message(queue_.first, true, message.data(), size, fds) < 0) {
            queue_again_ = now_ + 10ms;
            return false;
        }
        set_state(c, State::Done);
        settle(c);
        return true;
    }

    /// Moves requests that wait here to the queue. One whose head is too large for a datagram goes
    /// behind the others and waits for a runner of this worker.
    void pass_on() {
        while (now_ >= pass_at()) {  // a failure ends this: queue_again_
            const bool bulky = !enqueue(*ready_.front()) && errno == EMSGSIZE;
            if (bulky) { ready_.splice(ready_.end(), ready_, ready_.begin()); }
        }
    }

    /// A worker that leaves while others stay gives them even its unfinished requests.
    void pass_on_readers() {
        for (const auto& c : connections_) {
            const bool reader = c && c->state <= State::ReadBody && c->out.size() == 0;
            if (reader && !enqueue(*c) && errno != EMSGSIZE) { return; }
        }
    }

    /// Takes as many requests from the queue as the runners want, and puts them before those that
    /// wait here, which have not waited as long. Requests that are unfinished, or past their
    /// deadline, need no runner and are taken in any case; but not by a worker whose application
    /// may never load, as they would die with it.
    void take_from_queue() {
        const auto own = static_cast<std::ptrdiff_t>(ready_.size());
        size_t wanted = places();
        Passport next;
        const auto needs_none = [&] {
            return booted_ &&
                   ::recv(queue_.second.get(), &next, sizeof next, MSG_PEEK | MSG_DONTWAIT) > 0 &&
                   (next.state != State::Ready || now_ >= due(next));
        };
        while ((wanted > 0 || needs_none()) && dequeue()) { wanted -= wanted > 0 ? 1 : 0; }
        ready_.splice(ready_.end(), ready_, ready_.begin(), std::next(ready_.begin(), own));
    }

    /// Takes one connection from the queue. False: there is none, or no room for it, or this worker
    /// leaves the queue to those that stay.
    bool dequeue() {
        if (stop_ == Stop::Leave || stop_ == Stop::Now) { return false; }
        // Up to one above the limit; room first, as recvmsg() drops what it has no descriptor for.
        if (connected_ > config_.worker_connections && !shed()) { return false; }
        int fds[2] = {-1, -1};
        const ssize_t n = exchange_message(queue_.second, false, buffer_, kMaxMessage, fds);
        if (n < 0) { return false; }
        for (const int fd : fds) { set_flags(fd, false); }
        Fd file(fds[1]);
        Connection* c = adopt(Fd(fds[0]));
        if (c == nullptr) { return false; }
        c->unpack(string_view(buffer_, static_cast<size_t>(n)));
        const bool lost = c->stored > 0 && !file;  // there was no free descriptor for it
        if (c->stored > 0) { c->body.adopt_file(raise_fd(std::move(file)), c->stored); }
        if (c->state == State::Ready) { ready_.push_back(c); }
        if (c->state == State::ReadBody) { c->parser.at = c->framing; }
        if (c->state == State::ReadHead && !c->in.empty()) { parse(*c, ""); }
        if (c->state <= State::Ready && !c->eof) { read_client(*c); }  // what came meanwhile
        if (lost && c->state <= State::Ready) {
            refuse(*c, {503, "no descriptor for the body"});
        } else if (now_ >= due(*c)) {
            expire(*c);
        }
        settle(*c);
        return true;
    }

    // --- the runner -------------------------------------------------------------------------
    //
    // A runner ends in one of these ways, and always in bury():
    //   retired    a successor serves, or nothing is left to do: once it is idle its request pipes
    //              are closed, and it exits as any Python program does, in limited time (dismiss)
    //   hung       hung_app: SIGABRT as soon as no other slot is awaited, or --timeout later; then
    //              SIGKILL (end_runner)
    //   useless    lose_slot: SIGKILL, at once if it broke the protocol, else after a second
    //   dead       by itself: SIGCHLD brings it to bury() at once
    //
    // A request ends step by step: end_job() at the runner's end frame; end_reply() when the
    // response is complete, there or before; end_response() sends the rest of it, or an error
    // page; end_request() makes the slot go on.

    template <typename Action>
    void each_slot(Action action) {
        for (Runner& runner : runners_) {
            for (Slot& slot : runner.slots) { action(slot); }
        }
    }

    /// How many requests a slot would take now: one to run, and some ahead of time.
    size_t places(const Slot& slot) const {
        if (slot.runner->phase != Phase::Serving) { return 0; }
        const bool quick = !slot.answered && !slot.full_pipe && !slot.runner->new_log &&
                           now_ < slot.since + kAhead;
        const size_t limit = 1 + (quick || !slot.busy() ? slot.ahead_limit : 0);
        return limit - std::min(limit, slot.jobs.size());
    }

    size_t places() {
        size_t sum = 0;
        each_slot([&](const Slot& slot) { sum += places(slot); });
        return sum;
    }

    bool wants_request() { return places() > ready_.size(); }

    /// Where the next request should go: to an idle slot, or else ahead of time to a quick one.
    Slot* find_slot() {
        Slot* found = nullptr;
        each_slot([&](Slot& slot) {
            const bool better = found == nullptr || (found->busy() && !slot.busy());
            if (better && places(slot) > 0) { found = &slot; }
        });
        return found;
    }

    bool has_idle_slot() {
        const Slot* slot = find_slot();
        return slot != nullptr && !slot->busy();
    }

    /// Hands the requests that wait here to the slots that want them.
    void dispatch() {
        Slot* slot = nullptr;
        while (!ready_.empty() && (slot = find_slot()) && hand_over(*slot, *ready_.front())) {}
    }

    /// Gives an idle slot a request to run, or puts one into the next free pipe of a busy slot.
    /// False: that pipe did not take it as a whole, so it has to wait for an idle slot.
    bool hand_over(Slot& slot, Connection& c) {
        const string head = netstring(c.env);
        const string_view body = c.body.newest();
        const size_t size = head.size() + body.size();
        const Fd& pipe = slot.pipe_of(slot.jobs.size()).second;
        const bool fits = c.body.stored() == 0 && size <= slot.ahead_bytes;
        const ssize_t n = fits ? write_parts(pipe, head, {body}) : -1;
        const bool sent = n == static_cast<ssize_t>(size);
        if (slot.busy() && !sent) { return false; }
        set_state(c, State::Run);
        slot.jobs.push_back({&c, sent ? size : 0, c.parser.request_line});
        if (slot.jobs.size() > 1) { return true; }
        if (!sent) {
            slot.out = std::exchange(c.body, Spool());
            slot.out.prepend(head);
            slot.out.pop(static_cast<size_t>(std::max<ssize_t>(n, 0)));
        }
        begin_request(slot);
        feed_runner(slot);
        return true;
    }

    /// The first job of a slot becomes its present request.
    void begin_request(Slot& slot) {
        slot.answered = false;
        slot.since = last_begin_ = now_;
        slot.deadline = patience(now_);
    }

    static Time take_back_at(const Slot& slot) {
        return slot.jobs.size() < 2 || !slot.pipe() ? Time::max() : slot.since + kAhead;
    }

    /// Takes back requests that lie ahead and are unread, the last one first; they wait at the head
    /// of ready_ again. The runner may read at the same time, but each byte goes to one of the two:
    /// if we do not get a whole request, it is the runner's, and what we got goes back in. (The
    /// runner's end of the pipe is the same open file, and non-blocking meanwhile: see Slot.more in
    /// kRunner.) With `keep` 0, for a runner that is lost, takes back even the present request.
    void take_back(Slot& slot, size_t keep = 1) {
        while (slot.jobs.size() > keep) {
            Connection* client = slot.jobs.back().client;
            const size_t all = slot.jobs.back().size;
            const bool begun =
                client != nullptr && (client->response.status != 0 || !client->app_head.empty());
            if (all == 0 || begun) { return; }  // it may answer a request before reading it
            const Pair& pipe = slot.pipe_of(slot.jobs.size() - 1);
            ::fcntl(pipe.first.get(), F_SETFL, O_NONBLOCK);
            const ssize_t n = ::read(pipe.first.get(), buffer_, kMaxMessage);
            ::fcntl(pipe.first.get(), F_SETFL, 0);
            const size_t size = static_cast<size_t>(std::max<ssize_t>(n, 0));
            if (size < all && size > 0) { (void)write_some(pipe.second, {buffer_, size}); }
            if (size < all) { return; }
            slot.jobs.pop_back();
            if (client == nullptr) { continue; }
            set_state(*client, State::Ready);
            ready_.splice(ready_.begin(), ready_, std::prev(ready_.end()));
        }
    }

    void feed_runner(Slot& slot) {
        while (slot.pipe() && (slot.out.size() > 0 || slot.tell_gone)) {
            // By a write of its own, which is atomic (PIPE_BUF): the runner, once done, throws away
            // what it has read, and would take the rest of a torn "0:," for the next frame.
            if (slot.out.size() == 0) { slot.tell_gone = false, slot.out.append("0:,", kPiece); }
            const ssize_t n = write_some(slot.pipe(), slot.out.front());
            if (n < 0 && !slot.full_pipe) {
                slot.full_pipe.reset(::fcntl(slot.pipe().get(), F_DUPFD_CLOEXEC, 0));
                if (slot.full_pipe.get() >= FD_SETSIZE) { slot.full_pipe.reset(); }  // see tick()
            }
            if (n < 0) { return; }
            slot.out.pop(static_cast<size_t>(n));
        }
        slot.full_pipe.reset();
        if (slot.busy() && slot.answered && slot.pipe()) { end_request(slot); }
    }

    /// Reads once from the runner; false if there is nothing to read, or the slot is lost.
    bool read_runner(Slot& slot) {
        using Event = NetstringReader::Event;
        const ssize_t n = ::read(slot.replies.get(), replies_, sizeof replies_);
        if (n < 0 && would_block()) { return false; }
        if (n <= 0) { return lose_slot(slot), false; }
        if (slot.current() != nullptr) { slot.deadline = patience(now_); }
        string_view in(replies_, static_cast<size_t>(n)), piece;
        for (Event event; (event = slot.reader.next(in, piece)) != Event::NeedMore;) {
            const bool last = event == Event::End || event == Event::Failed;
            const bool behind = last && !in.empty() && slot.jobs.size() < 2;
            const bool stray = event != Event::End || slot.runner->phase == Phase::Serving;
            if (event == Event::Bad || behind || (!slot.busy() && stray)) {
                log(Level::Error, slot.runner->name() + "broke the protocol");
                lose_slot(slot);
                return end_runner(*slot.runner), false;
            }
            if (event == Event::Whole) { end_reply(slot, true); }
            if (last) { end_job(slot, event == Event::End); }
            if (event == Event::Piece && slot.current() != nullptr) { take_reply(slot, piece); }
        }
        Connection* c = slot.current();
        if (c != nullptr && c->state == State::Reply) { flush(*c), settle(*c); }
        return true;
    }

    /// Takes a piece of the response. The application's head is checked before anything is sent.
    void take_reply(Slot& slot, string_view piece) {
        Connection& c = *slot.current();
        if (c.response.status != 0) { return reply_body(slot, c, piece); }
        string joined = std::move(c.app_head);  // what came before, or nothing
        const string_view all = joined.empty() ? piece : joined += piece;
        const size_t end = all.find("\n\n");
        if (end == string::npos && all.size() <= kMaxHead) { return void(c.app_head = all); }
        Response& r = c.response;
        Error error{500, "a head without end"};
        if (end != string::npos) { error = parse_response(all.substr(0, end + 1), r); }
        if (error) {
            abandon(slot);
            return end_response(c, false, {500, "the application sent " + error.text});
        }
        if (!r.dropped.empty()) {
            log_about(c, Level::Warning, "Dropped what the application may not set: " + r.dropped);
        }
        c.bodyless = c.bodyless || r.status == 204 || r.status == 304;
        c.left = c.bodyless ? -1 : r.length;
        c.chunked = !c.bodyless && c.left < 0 && c.minor > 0;
        c.head = final_head(r, c.minor, c.chunked);
        c.out.append(c.head, kReplyMemory);
        set_state(c, State::Reply);
        if (!c.bodyless) { reply_body(slot, c, all.substr(end + 2)); }
    }

    /// Takes a piece of the body: cut to its Content-Length, or in a chunk, if need be.
    void reply_body(Slot& slot, Connection& c, string_view piece) {
        const int64_t most = c.bodyless ? 0 : c.left >= 0 ? c.left : INT64_MAX;
        const string_view fits =
            piece.substr(0, static_cast<size_t>(std::min<int64_t>(most, INT_MAX)));
        if (c.left >= 0) { c.left -= static_cast<int64_t>(fits.size()); }
        c.body_bytes += static_cast<int64_t>(fits.size());
        const bool chunk = c.chunked && !fits.empty();
        char size[20] = "";
        if (chunk) { std::snprintf(size, sizeof size, "%zx\r\n", fits.size()); }
        send_or_keep(c, {size, fits, chunk ? "\r\n" : ""});
        if (fits.size() == piece.size()) { return; }
        if (!c.bodyless) {
            log_about(c, Level::Error, "The response is longer than its Content-Length");
        }
        slot.tell_gone = true;  // the client may have no more
        end_reply(slot, true);
    }

    /// Large pieces are written to the client at once, without a copy, behind what c.out still has
    /// if that is all in memory. Small ones, and what the client does not take, go into c.out for
    /// the flush() at the end of read_runner(): in memory up to kReplyMemory for a client and
    /// kWorkerMemory for all; the rest in a file, written 4 KiB or more at a time.
    void send_or_keep(Connection& c, std::initializer_list<string_view> parts) {
        size_t all = static_cast<size_t>(c.out.size()), gone = 0;
        for (const string_view part : parts) { all += part.size(); }
        const string_view kept = all >= kPiece / 4 ? c.out.front() : string_view();
        if (all >= kPiece / 4 && c.out.size() == static_cast<int64_t>(kept.size())) {
            const ssize_t n = write_parts(c.socket, kept, parts);
            if (n > 0) { gone = static_cast<size_t>(n), c.since = now_; }
            c.out.pop(std::min(gone, kept.size()));
            gone -= std::min(gone, kept.size());
        }
        const size_t older = c.out.memory() - c.out.newest().size();
        const size_t limit = reply_memory_ < kWorkerMemory ? kReplyMemory : older + kPiece / 16;
        for (const string_view part : parts) {
            const size_t here = std::min(gone, part.size());
            gone -= here;
            c.out.append(part.substr(here), limit);
        }
    }

    /// The application is loaded: from now on this runner serves, and the one before it only
    /// finishes what it has; with many slots it might never have been idle by itself.
    void runner_ready(Runner& runner) {
        for (Runner& old : runners_) {
            if (old.phase != Phase::Serving || runner.dead) { continue; }
            log(Level::Info, "Autorestarting runner (pid:" + to_string(old.pid) + ")");
            old.phase = Phase::Retired;
        }
        runner.phase = Phase::Serving;
        tell_log(runner);
        if (!std::exchange(booted_, true)) { notify(); }
        check_queue_ = true;
    }

    /// An end frame: the runner is done with the present request, or has loaded the application.
    void end_job(Slot& slot, bool good) {
        if (slot.runner->phase == Phase::Booting) { return runner_ready(*slot.runner); }
        slot.answered = true;
        if (slot.runner->left > 0) { failures_ = 0; }  // else they are those of its successors
        const auto took = std::max<Clock::duration>(now_ - slot.since, 1us);
        slot.mean += (took - slot.mean) / 8;  // one quick request among slow ones proves nothing
        const auto ahead = static_cast<size_t>(kAhead / std::max(took, slot.mean));
        slot.ahead_limit = std::min(slot.pipes.size() - 1, ahead);
        end_reply(slot, good);
    }

    /// The response is complete, or has failed; the runner may still be busy with close().
    void end_reply(Slot& slot, bool good) {
        Connection* c = slot.current();
        feed_runner(slot);  // first, so that the slot goes on without waiting for this client
        if (c == nullptr) { return; }
        if (slot.current() == c) { slot.jobs.front().client = nullptr; }  // the slot is busy still
        const bool cut = good && c->left > 0;
        if (!good) { log_about(*c, Level::Error, "Error handling request"); }
        if (cut) { log_about(*c, Level::Error, "The response is shorter than its Content-Length"); }
        if (good && c->chunked) { c->out.append("0\r\n\r\n", kReplyMemory); }
        end_response(*c, good && !cut, {500, "the application failed"});
    }

    /// No more of this response will come; if nothing has come yet, the answer is `error`.
    void end_response(Connection& c, bool good, const Error& error) {
        c.broken = !good && c.response.status != 0;  // an error page is not cut
        c.complete = true;
        c.response.status == 0 ? refuse(c, error) : flush(c);
        settle(c);
    }

    /// Nobody waits for the response any more: tells the runner.
    void abandon(Slot& slot) {
        slot.jobs.front().client = nullptr;
        slot.tell_gone = true;
        feed_runner(slot);
    }

    /// The end frame has come, and the request has gone out entirely: the slot goes on with what
    /// lies ahead, or is idle.
    void end_request(Slot& slot) {
        Runner& runner = *slot.runner;
        slot.out = Spool();  // frees its memory and file: the slot may be idle for long
        slot.index = (slot.index + 1) % slot.pipes.size();
        slot.jobs.erase(slot.jobs.begin());
        if (slot.busy()) {
            begin_request(slot);
            slot.tell_gone = slot.current() == nullptr;
            feed_runner(slot);
        }
        tell_log(runner);
        if (--runner.left == 0) { next_tick_ = now_; }  // its successor is due
        check_queue_ = slot.ahead_limit == 0 || slot.index == 0 || !ready_.empty() || check_queue_;
    }

    /// A slot's pipes are of no use any more: the runner has to leave, or gets SIGKILL in a second.
    /// Until then what runs in its other slots may still end.
    void lose_slot(Slot& slot) {
        Runner& runner = *slot.runner;
        if (slot.busy() || runner.phase != Phase::Retired) { runner.phase = Phase::Dying; }
        take_back(slot, 0);
        slot.close_requests();
        slot.replies.reset();
        slot.deadline = Time::max();
        kill_runner_after(runner, 1s);
    }

    void kill_runner_after(Runner& runner, Clock::duration delay) const {
        runner.kill_at = std::min(runner.kill_at, now_ + delay);
    }

    /// Sends a hung runner SIGABRT, at which faulthandler prints the stacks; others, with all that
    /// they have forked, SIGKILL.
    void end_runner(Runner& runner) const {
        if (runner.dead) { return; }
        const bool hung = runner.phase == Phase::Hung;
        runner.phase = Phase::Dying;
        runner.signal = hung ? SIGABRT : SIGKILL;
        runner.kill_at = hung ? now_ + kKillDelay : Time::max();
        ::kill(hung ? runner.pid : -runner.pid, runner.signal);
    }

    /// Not a byte for --timeout. What runs in other slots has as long again to end, while a
    /// successor serves; but kKillDelay only, if there are two runners already. (The message is the
    /// one that gunicorn has for a hung worker, as in murder_workers().)
    void hung_app(Slot& slot) {
        Runner& runner = *slot.runner;
        Connection* c = slot.current();
        slot.jobs.front().client = nullptr;
        log(Level::Critical, "WORKER TIMEOUT (pid:" + to_string(runner.pid) + "): no answer for " +
                                 to_string(config_.timeout) +
                                 " s: " + escape(slot.jobs.front().request));
        restart_at_ = std::min(restart_at_, now_ + 1s);  // even after many failures in a row
        if (runner.signal == 0 && std::exchange(runner.phase, Phase::Hung) != Phase::Hung) {
            kill_runner_after(runner,
                              runners_.size() > 1 ? Clock::duration(kKillDelay) : config_.timeout);
        }
        slot.deadline = Time::max();
        take_back(slot);
        if (c != nullptr) { end_response(*c, false, {504, "the application did not answer"}); }
    }

    /// Makes a runner without work leave: its input ends, and it exits by itself, or is killed.
    void dismiss(Runner& runner) {
        const bool booting = runner.phase == Phase::Booting, now = stop_ == Stop::Now;
        kill_runner_after(runner, booting ? 0ms : now ? kKillDelay / 2 : config_.graceful_timeout);
        for (Slot& slot : runner.slots) { slot.close_requests(); }
        runner.phase = Phase::Retired;
    }

    void reap_runners() {
        for (auto it = runners_.begin(); it != runners_.end();) {
            const auto each = it++;
            int status = 0;
            if (::waitpid(each->pid, &status, WNOHANG) != 0) { bury(each, status); }  // -1: gone
        }
    }

    /// A runner has ended: answers its requests and, unless it was to leave, has another started.
    void bury(std::list<Runner>::iterator found, int status) {
        Runner& runner = *found;
        runner.dead = true;
        for (Slot& slot : runner.slots) {
            while (slot.replies && read_runner(slot)) {}  // what it has written before still counts
            take_back(slot, 0);
        }
        const bool retired = runner.phase == Phase::Retired && !runner.busy();
        std::list<Runner> gone;
        gone.splice(gone.begin(), runners_, found);
        if (WIFSIGNALED(status)) { ::kill(-runner.pid, SIGKILL); }
        if (runner.busy() || runner.left <= 0) { failures_ = 0; }  // it did serve
        std::vector<Connection*> clients;
        string lines;
        for (const Slot& slot : runner.slots) {
            for (const Job& job : slot.jobs) {
                if (job.client == nullptr) { continue; }
                clients.push_back(job.client);
                (lines += lines.empty() ? ": " : ", ") += escape(job.request);
            }
        }
        const bool ours = runner.signal != 0 || (retired && WTERMSIG(status) == SIGTERM);
        if ((has_work() && !retired) || (status != 0 && !ours)) {
            log(Level::Error, runner.name() + exit_text(status, ours) + lines);
        }
        const Error error =
            stop_ == Stop::Now ? Error{503, "the server stops"} : Error{502, "the runner died"};
        for (Connection* c : clients) { end_response(*c, false, error); }
        if (has_work() && !retired) { runner_failed(status); }
    }

    /// Has another runner started: at once, or the later the more have ended in a row without a
    /// request (one that ends over a request does not count: a client could bring that about). A
    /// worker that has never booted exits instead.
    void runner_failed(int status) {
        const auto serves = [](const Runner& each) { return each.phase == Phase::Serving; };
        const seconds delay = backoff(failures_ + (find(runners_, serves) ? 1 : 0));
        const int code = WIFEXITED(status) ? WEXITSTATUS(status) : 0;
        const bool none_ran = code == kWorkerBootError || code >= 126;  // sh: it cannot exec
        if (!booted_) { status_ = none_ran ? kWorkerBootError : kAppLoadError; }
        if (++failures_ > 1) {
            log(Level::Warning, "The next runner starts in " + to_string(delay) + " s");
        }
        restart_at_ = now_ + delay;
        next_tick_ = now_;
    }

    /// With --reload: tells the arbiter if a file has changed in the last second. The runner only
    /// ever appends to its list of names, so `watched` stays in step with it.
    void watch_files() {
        if (runners_.empty()) { return; }
        Runner& runner = runners_.back();  // the newest
        Strings names = config_.reload_extra_files;
        struct stat info = {};
        ::fstat(runner.files.get(), &info);
        string list(static_cast<size_t>(info.st_size), '\0');
        (void)!::pread(runner.files.get(), list.data(), list.size(), 0);
        string_view rest = list;
        while (!rest.empty()) { names.emplace_back(cut(rest, '\0')); }
        runner.watched.resize(names.size());
        string changed;
        for (size_t i = 0; i < names.size(); ++i) {
            if (::stat(names[i].c_str(), &info) < 0) { continue; }  // an editor is replacing it
            const int64_t modified = nanoseconds(info.st_mtim);
            const int64_t before = std::exchange(runner.watched[i], modified);
            const bool future = info.st_mtim.tv_sec > std::time(nullptr);
            const bool other = before == 0 ? modified > runner.started && !future  // a new name
                                           : modified != before;
            if (other) { changed = names[i]; }
        }
        if (changed.empty()) { return; }
        log(Level::Info, "Worker reloading: " + changed + " modified");
        ask_reload();
    }

    Error boot_runner() {
        char here[PATH_MAX];  // if ours was removed, there may be another in its place
        if (::realpath(".", here) == nullptr) { (void)!::chdir(config_.chdir.c_str()); }
        Runner& runner = runners_.emplace_back();
        if (Error error = start_runner(config_, runner)) {
            runners_.pop_back();
            restart_at_ = now_ + 1s;
            return error;
        }
        runner.slots[0].deadline = patience(now_);
        feed_runner(runner.slots[0]);
        const auto extra = ::random() % (int64_t{config_.max_requests_jitter} + 1);
        if (config_.max_requests > 0) { runner.left = int64_t{config_.max_requests} + extra; }
        return {};
    }

    const Config& config_;
    std::list<Listener>& listeners_;
    int closed_ = 0;     // for empty_backlog(): how many were accepted from the last of these
    const Pair& queue_;  // first: to send; second: to receive
    const Fd& tmp_;      // the heartbeat file
    const pid_t arbiter_;
    int wishes_ = 0;                                       // how often a reload was asked for
    std::list<Runner> runners_;                            // one serves; others boot or leave
    std::unique_ptr<Connection> connections_[FD_SETSIZE];  // by descriptor
    std::list<Connection*> ready_;                         // complete, waiting here for a runner
    int connected_ = 0, status_ = 0, max_fd_ = 0;
    int failures_ = 0;  // how many runners in a row ended without a request
    Stop stop_ = Stop::No;
    bool booted_ = false, spinner_ = false;
    bool logs_access_ = true;   // the last line of the access log was written
    bool check_queue_ = false;  // look into the ready queue before handing out what waits here
    size_t head_memory_ = 0, reply_memory_ = 0;  // of all clients
    fd_set reads_{}, writes_{};                  // the clients that select() watches
    fd_set hot_{}, fresh_{};  // of reads_: with an event in this or the last tick; in this one
    Time now_ = Clock::now(), next_tick_ = now_, next_notify_ = now_, accept_again_ = now_;
    Time queue_again_ = now_, yield_again_ = now_, restart_at_ = now_, hot_until_ = now_;
    Time last_begin_ = now_;          // when a request last went to a runner
    bool client_waits_ = false;       // a client came while all slots were busy
    Time next_look_ = now_;           // when to see if it still waits; else when to look for others
    Time stopped_{}, thawed_{};       // when we were told to stop; when we went on after SIGSTOP
    Time last_accept_{}, lost_at_{};  // when a client was last accepted; last lost to others
    string shown_;                    // what ps shows
    char replies_[kMaxMessage];       // from a runner; not buffer_, which is used meanwhile
    char buffer_[kMaxMessage];        // from a client or the ready queue
};

// ============================================================================
//  11. Arbiter: the master process
//
//  It never reads a request and never waits for a worker. Its loop sleeps on the self-pipe, looks
//  at the heartbeat files, handles one signal at a time, and starts and ends workers as needed.
// ============================================================================
struct WorkerInfo {
    pid_t pid;
    int generation;              // goes up with each reload; -1 once it has been told to stop
    Fd tmp;                      // its heartbeat file
    Time spawned, last_change;   // last_change: when, on our clock, we saw last_update change
    int64_t last_update = 0;     // the ctime of that file
    mode_t wishes = 0;           // the bits of its mode that count wishes for a reload
    Time stop_by = Time::max();  // when to send SIGKILL, if it has been told to stop or aborted
    bool booted = false, aborted = false;
};

class Arbiter {
public:
    Arbiter(Config& config, std::list<Listener>& listeners)
        : config_(config), listeners_(listeners) {}

    /// Runs the server until it is told to stop; returns the exit status.
    int run() {
        if (Error error = start()) {
            log(Level::Critical, error.text), status_ = error.code, halt(SIGQUIT);
        }
        while (!stopping_ || !workers_.empty()) {
            manage_workers();
            const auto due = [](const auto& w) { return !w.booted || w.stop_by < Time::max(); };
            const bool soon = config_.reload || now_ < spawn_again_ || find(workers_, due);
            (void)is_ready(g_self_pipe.first, woken_ + (soon ? kTick : 1000ms));
            // now_ leaves out any time in which we were stopped: the workers may have been, too.
            const Time before = std::exchange(woken_, Clock::now());
            if (woken_ < before + 1500ms) { now_ += woken_ - before; }
            read_heartbeats();
            for (int number; (number = next_signal()) >= 0;) { handle_signal(number); }
            reap_workers();
            murder_workers();
            if (now_ >= reload_at_) { handle_hup(); }
            maybe_promote_master();
        }
        const bool heir = reexec_pid_ > 0;  // a new master, which goes on with socket and pid file
        if (!heir && !has_old_master()) { unlink_sockets(listeners_); }
        const char* pidfile = config_.pidfile.c_str();
        if (!heir && read_pidfile(pidfile) == ::getpid()) { ::unlink(pidfile); }
        log(Level::Info, "Shutting down: Master");
        if (status_ == kAppLoadError) { log(Level::Error, "Reason: App failed to load."); }
        if (status_ == kWorkerBootError) { log(Level::Error, "Reason: Worker failed to boot."); }
        return status_;
    }

private:
    Error start() {
        set_title(config_, "master");
        int fds[2];
        if (::socketpair(AF_UNIX, SOCK_DGRAM, 0, fds) < 0) { return os_error("no ready queue"); }
        queue_ = {Fd(fds[0]), Fd(fds[1])};
        for (const int fd : fds) {
            set_flags(fd, true);
            const int bytes = 3 * kPiece;  // some systems have 4 KiB by default
            ::setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
            ::setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &bytes, sizeof bytes);
        }
        if (Error error = make_pipe(g_self_pipe, true)) { return error; }
        for (const auto& [number, name] : kSignals) {  // with --check-config each just ends us
            if (!config_.check_config) { set_signals({number}, on_signal); }
        }
        set_signals({SIGCHLD}, on_signal);
        if (Error error = write_pidfile(config_.pidfile)) { return error; }
        Strings texts;
        for (const Listener& each : listeners_) { texts.push_back(each.text); }
        log(Level::Debug, "Current configuration:\n" + show_config(config_));
        log(Level::Info, string("Starting server ") + kVersion);
        log(Level::Info, "Listening at: " + to_string(texts) + " (" + to_string(::getpid()) + ")");
        log(Level::Info,
            "Using worker: " + (config_.threads > 1 ? "gthread" : config_.worker_class));
        return {};
    }

    void handle_signal(int number) {
        for (const auto& [each, name] : kSignals) {
            if (each == number) { log(Level::Info, string("Handling signal: ") + name); }
        }
        if (number == SIGHUP) { handle_hup(); }
        if (number == SIGTERM && !stopping_) { halt(SIGUSR2); }
        if (number == SIGINT || number == SIGQUIT) { halt(SIGQUIT); }
        if (number == SIGUSR1) { handle_usr1(); }
        if (number == SIGUSR2 && !stopping_) { handle_usr2(); }
        if (number == SIGWINCH && config_.daemon) { paused_ = true; }
        if (number == SIGTTIN) { ++config_.workers; }
        if (number == SIGTTOU) { config_.workers = std::max(1, config_.workers - 1); }
    }

    /// Makes the new log files before the workers open them: as --user they may not be able to.
    void handle_usr1() {
        if (Error error = open_logs(config_)) { log(Level::Error, error.text); }
        for (const WorkerInfo& worker : workers_) { ::kill(worker.pid, SIGUSR1); }
    }

    bool has_old_master() const {
        return config_.old_master > 0 && ::getppid() == config_.old_master;
    }

    /// Upgrade: starts the program that is on disk now as another master, with our sockets. TERM to
    /// either leaves the other serving.
    void handle_usr2() {
        if (reexec_pid_ > 0 || has_old_master()) {
            return log(Level::Warning, "No upgrade: one goes on already");
        }
        block_signals(true);
        const pid_t master = ::getpid(), pid = ::fork();
        if (pid == 0) { reexec(master); }
        block_signals(false);
        if (pid < 0) { return log(Level::Error, os_error("cannot fork").text); }
        reexec_pid_ = pid;
    }

    /// In the forked child: execs the new master. The sockets keep their numbers.
    [[noreturn]] void reexec(pid_t master) {
        string sockets;
        for (const Listener& each : listeners_) {
            ::fcntl(each.fd.get(), F_SETFD, 0);
            sockets += to_string(each.fd.get()) + ":" + to_string(each.bound_at) + ":";
        }
        ::setenv("SERVER_SOCKETS", sockets.c_str(), 1);
        ::setenv("SERVER_UPGRADE", to_string(master).c_str(), 1);  // we may have died by then
        (void)!::chdir(config_.directory.c_str());
        exec_program(config_, config_.argv);
    }

    /// Once the old master has gone, takes its place and the name of its pid file.
    void maybe_promote_master() {
        if (config_.old_master == 0 || has_old_master()) { return; }
        config_.old_master = 0;
        log(Level::Info, "Master has been promoted.");
        const string beside = config_.pidfile;  // NAME.2, or empty: then rename() fails
        config_.pidfile = beside.substr(0, beside.rfind('.'));
        (void)::rename(beside.c_str(), config_.pidfile.c_str());
    }

    /// Stops the server. SIGUSR2: workers finish what they have. SIGQUIT, even later: at once.
    void halt(int number) {
        if (!std::exchange(stopping_, true) && !has_old_master()) {
            notify_systemd(reexec_pid_ > 0 ? "MAINPID=" + to_string(reexec_pid_) : "STOPPING=1");
        }
        for (Listener& each : listeners_) { each.fd.reset(); }
        for (WorkerInfo& worker : workers_) { stop_worker(worker, number); }
    }

    void stop_worker(WorkerInfo& worker, int number) const {
        const auto limit = number == SIGQUIT ? 700ms : config_.graceful_timeout + 2s;
        worker.stop_by = std::min(worker.stop_by, now_ + limit);
        worker.generation = -1;
        ::kill(worker.pid, number);
    }

    /// Reload: starts one worker of a new generation, the canary. When it is ready the rest follow,
    /// and then the old ones go (read_heartbeats, manage_workers); if it fails, they stay
    /// (worker_lost). Also reopens the logs, and the directory, which may be a symbolic link.
    void handle_hup() {
        reload_at_ = Time::max();
        if (stopping_) { return; }
        log(Level::Info, "Hang up: Master");
        const auto now = std::chrono::duration_cast<microseconds>(Clock::now().time_since_epoch());
        notify_systemd("RELOADING=1\nMONOTONIC_USEC=" + to_string(now.count()));
        paused_ = false;
        next_directory_ = Fd(::open(config_.chdir.c_str(), O_DIRECTORY | O_CLOEXEC));
        if (!next_directory_) {
            log(Level::Error, os_error("cannot change to " + config_.chdir).text);
        }
        if (Error error = open_logs(config_)) { log(Level::Error, error.text); }
        for (WorkerInfo& worker : workers_) {
            if (worker.generation > generation_) { stop_worker(worker, SIGTERM); }
        }
        spawn_worker(generation_ + 1);
    }

    /// Reads from the heartbeat files which workers live, are ready, or want a reload. A canary
    /// that is ready makes its generation the serving one, and fulfils what older ones wished. A
    /// ctime is compared with the one before only, so that setting the clock kills no worker.
    void read_heartbeats() {
        for (WorkerInfo& worker : workers_) {
            struct stat info = {};
            ::fstat(worker.tmp.get(), &info);
            const int64_t ctime = nanoseconds(info.st_ctim);
            if (std::exchange(worker.last_update, ctime) != ctime) { worker.last_change = now_; }
            const mode_t wishes = info.st_mode & 0174;
            const bool wish = std::exchange(worker.wishes, wishes) != wishes;
            if (wish && worker.generation >= generation_) {
                reload_at_ = std::min(reload_at_, now_ + kGather);
            }
            if (worker.booted || (info.st_mode & 2) == 0) { continue; }
            worker.booted = ever_booted_ = true;
            notify_systemd("READY=1\nSTATUS=" + to_string(config_.workers) + " workers");
            if (config_.check_config) { halt(SIGUSR2); }
            if (worker.generation <= generation_) { continue; }
            generation_ = worker.generation, spawn_again_ = now_, failures_ = 0;
            if (worker.wishes == 0) { reload_at_ = Time::max(); }
            if (next_directory_) { directory_ = std::move(next_directory_); }
            for (const WorkerInfo& each : workers_) {  // leave the ready queue to the new ones
                if (each.generation < 0) { ::kill(each.pid, SIGWINCH); }
            }
        }
    }

    /// Ends workers whose heartbeat has stopped for --timeout, by SIGABRT and then SIGKILL, and by
    /// SIGKILL those that have not stopped in time after they were told to.
    void murder_workers() {
        for (WorkerInfo& worker : workers_) {
            if (now_ >= worker.stop_by) { ::kill(worker.pid, SIGKILL); }
            const bool late = config_.timeout > 0s && now_ >= worker.last_change + config_.timeout;
            if (!late || std::exchange(worker.aborted, true)) { continue; }
            worker.stop_by = std::min(worker.stop_by, now_ + kKillDelay);
            log(Level::Critical, "WORKER TIMEOUT (pid:" + to_string(worker.pid) + ")");
            ::kill(worker.pid, SIGABRT);
        }
    }

    void reap_workers() {
        int status = 0;
        for (pid_t pid; (pid = ::waitpid(-1, &status, WNOHANG)) > 0;) {
            if (pid == reexec_pid_) {
                reexec_pid_ = 0;
                log(Level::Warning,
                    "The new master (pid:" + to_string(pid) + ") " + exit_text(status));
            }
            WorkerInfo* found = find(workers_, [pid](const WorkerInfo& w) { return w.pid == pid; });
            if (found == nullptr) { continue; }
            const WorkerInfo worker = std::move(*found);
            workers_.erase(workers_.begin() + (found - workers_.data()));
            const bool ours = worker.aborted || now_ >= worker.stop_by;
            const string name = "Worker (pid:" + to_string(pid) + ") ";
            if (status != 0) { log(Level::Error, name + exit_text(status, ours)); }
            if (!stopping_) { worker_lost(worker, WIFEXITED(status) ? WEXITSTATUS(status) : 0); }
        }
    }

    /// Halts if no worker has ever booted; a lost canary ends the reload; else backs off, lest a
    /// crash loop spin. Workers spawned before the last failure count as part of it.
    void worker_lost(const WorkerInfo& worker, int code) {
        const bool boot_error = code == kWorkerBootError || code == kAppLoadError;
        if (!ever_booted_ && (boot_error || config_.check_config)) {
            status_ = boot_error ? code : kWorkerBootError;
            return halt(SIGQUIT);
        }
        if (worker.generation > generation_) {
            const auto booted = [](const WorkerInfo& each) { return each.booted; };
            if (find(workers_, booted)) { notify_systemd("READY=1"); }
            return log(Level::Error, "Reload failed: the old workers go on");
        }
        if (worker.generation < 0 || worker.spawned < spawn_again_) { return; }
        failures_ = worker.booted && now_ > worker.spawned + 5s ? 0 : failures_ + 1;
        const seconds delay = backoff(failures_ - 1);
        if (delay > 0s) {
            log(Level::Warning, "Workers fail: the next starts in " + to_string(delay) + " s");
        }
        spawn_again_ = now_ + delay;
    }

    /// Spawns or stops workers of the serving generation until they are as many as wanted; stops
    /// older ones once these are ready. Surplus ones go in this order: not ready yet, then oldest.
    void manage_workers() {
        const int wanted = paused_ ? 0 : config_.workers;
        int alive = 0, ready = 0;
        for (const WorkerInfo& worker : workers_) {
            const bool counts = worker.generation == generation_;
            alive += counts ? 1 : 0;
            ready += counts && worker.booted ? 1 : 0;
        }
        for (; alive < wanted && now_ >= spawn_again_ && !stopping_; ++alive) {
            spawn_worker(generation_);
        }
        for (WorkerInfo& worker : workers_) {
            const bool old = worker.generation < generation_ && ready >= wanted;
            const bool surplus = worker.generation == generation_ && alive > wanted &&
                                 (!worker.booted || ready > wanted);
            if (worker.generation < 0 || !(old || surplus)) { continue; }
            stop_worker(worker, paused_ ? SIGUSR2 : SIGTERM);  // USR2: nobody else serves the queue
            alive -= surplus ? 1 : 0;
            ready -= surplus && worker.booted ? 1 : 0;
        }
    }

    /// Forks one worker; a failure counts as a lost worker. The child leaves by _exit(), so that no
    /// destructor or exit handler of the arbiter runs in it.
    void spawn_worker(int generation) {
        Fd tmp;
        Error error = make_temp_file(config_.worker_tmp_dir, tmp);
        if (!error && !give_away(config_, tmp)) { error = os_error("cannot chown a file"); }
        block_signals(true);
        const pid_t arbiter = ::getpid(), pid = error ? -1 : ::fork();
        if (pid == 0) {
            workers_.clear();
            (void)!::fchdir(directory_.get());  // fails, rightly, before the first reload
            if (generation > generation_) { (void)!::fchdir(next_directory_.get()); }
            Worker* worker = new Worker(config_, listeners_, queue_, tmp, arbiter);
            ::_exit(worker->run());
        }
        if (!error && pid < 0) { error = os_error("cannot fork"); }
        block_signals(false);
        if (error) {
            log(Level::Error, "No new worker: " + error.text);
            return worker_lost({pid, generation, Fd(), now_, now_}, kWorkerBootError);
        }
        workers_.push_back({pid, generation, std::move(tmp), now_, now_});
    }

    static constexpr std::pair<int, const char*> kSignals[] = {
        {SIGHUP, "hup"},   {SIGINT, "int"},   {SIGQUIT, "quit"},
        {SIGTERM, "term"}, {SIGTTIN, "ttin"}, {SIGTTOU, "ttou"},
        {SIGUSR1, "usr1"}, {SIGUSR2, "usr2"}, {SIGWINCH, "winch"}};
    Config& config_;  // `workers`, `pidfile` and `old_master` change
    std::list<Listener>& listeners_;
    Pair queue_;
    std::vector<WorkerInfo> workers_;  // the oldest first
    pid_t reexec_pid_ = 0;             // the new master of an upgrade, our child
    int generation_ = 0;               // the serving one
    Fd directory_, next_directory_;    // opened by reloads: of generation_, and of the canary
    int failures_ = 0, status_ = 0;
    bool stopping_ = false, ever_booted_ = false;
    bool paused_ = false;                                               // by WINCH: no workers
    Time woken_ = Clock::now();                                         // when run() last woke up
    Time now_ = woken_, spawn_again_ = now_, reload_at_ = Time::max();  // without stops: see run()
};

// ============================================================================
//  12. main: puts the settings into force, binds or inherits the sockets
//
//  Mistakes in the settings are reported here, while somebody is at the terminal to read of them.
// ============================================================================

/// Shares the descriptors out: to request pipes, and to `most` connections of a worker.
Error share_descriptors(Config& config, int& most) {
    config.soft_limit = set_soft_limit(4 * FD_SETSIZE);
    const rlim_t limit = set_soft_limit(4 * FD_SETSIZE);  // again, to learn what it is now
    const bool ample = limit >= 4 * FD_SETSIZE && config.threads == 1;
    config.pipes = !config.runner.empty() ? 1 : ample ? config.pipes : 2;
    // `others` are below FD_SETSIZE, as clients are: two for each slot of two runners, and what was
    // open before. `far` are above it, if there is room: the other ends of pipes, and those of a
    // runner that is being started. A client may have a file, too: hence two for each.
    int others = 10 + 4 * config.threads + static_cast<int>(config.bind.size());
    for (int fd = 0; fd < FD_SETSIZE; ++fd) { others += ::fcntl(fd, F_GETFD) >= 0 ? 1 : 0; }
    const int far = 5 + (5 * config.pipes + 1) * config.threads;
    const int all = static_cast<int>(limit) - others;
    most = std::min(FD_SETSIZE - others, (all - far) / 2);
    if (others >= FD_SETSIZE) { return {1, "too many descriptors are open"}; }
    if (most < 1 && config.threads > 1) { return {1, "too few descriptors for so many --threads"}; }
    most = std::max(1, most);
    const rlim_t needed = std::min(limit, static_cast<rlim_t>(8 * config.threads + 20));
    config.soft_limit = std::max(config.soft_limit, needed);
    return {};
}

/// Puts the settings into force: directory, descriptors, logs.
Error apply(Config& config) {
    if (config.threads > 1 && !config.runner.empty()) {
        return {1, "--threads is for Python: a --runner has one pair of pipes"};
    }
    if (!config.chdir.empty() && ::chdir(config.chdir.c_str()) < 0) {
        return os_error("cannot change to " + config.chdir);
    }
    config.chdir = absolute(config.directory, config.chdir);
    if (config.proc_name.empty()) { config.proc_name = config.app; }
    int64_t count = 0, old_master = 0;
    if (parse_number(environment("SERVER_UPGRADE"), old_master)) {  // it may have died already
        config.old_master = static_cast<pid_t>(old_master);
        config.sockets = environment("SERVER_SOCKETS");
        config.detached = config.daemon;
        if (!config.pidfile.empty()) { config.pidfile += ".2"; }  // beside that of the old master
    }
    if (config.sockets.empty() && environment("LISTEN_PID") == to_string(::getpid()) &&
        parse_number(environment("LISTEN_FDS"), count)) {
        const int end = 3 + static_cast<int>(std::min<int64_t>(count, FD_SETSIZE / 2));
        for (int fd = 3; fd < end; ++fd) { config.sockets += to_string(fd) + ":0:"; }
    }
    int most = 0;
    if (Error error = share_descriptors(config, most)) { return error; }
    Fd probe;
    if (config.worker_tmp_dir.empty()) {  // a disk that stalls must not look like a dead worker
        config.worker_tmp_dir = make_temp_file("/dev/shm", probe) ? temp_dir() : "/dev/shm";
    }
    config.worker_tmp_dir = absolute(config.chdir, config.worker_tmp_dir);
    string spool_dir = temp_dir();
    for (const string& pair : config.raw_env) {  // as the workers will have it
        if (pair.find("TMPDIR=/") == 0) { spool_dir = pair.substr(7); }
    }
    if (Error error = make_temp_file(config.worker_tmp_dir, probe)) { return error; }
    if (Error error = resolve_user(config)) { return error; }
    {  // workers keep large bodies there
        const AsUser user(config, config.uid != ::geteuid());
        if (Error error = make_temp_file(spool_dir, probe)) {
            return {1, error.text + ": set $TMPDIR"};
        }
    }
    if (Error error = check_pidfile(config)) { return error; }
    if (config.errorlog.empty()) { config.errorlog = "-"; }
    for (string* path : {&config.errorlog, &config.accesslog}) {  // to reopen them from anywhere
        if (!path->empty() && *path != "-") { *path = absolute(config.chdir, *path); }
    }
    if (Error error = open_logs(config)) { return error; }
    if (config.worker_connections > most) {
        const bool asked = config.worker_connections != Config{}.worker_connections;
        log(asked ? Level::Warning : Level::Info,
            "--worker-connections lowered from " + to_string(config.worker_connections) + " to " +
                to_string(most) + ", which is what fits");
        config.worker_connections = most;
    }
    if (config.check_config) {  // load the application in one worker, and leave no trace
        config.workers = 1;
        config.daemon = config.reload = false;
        config.pidfile.clear(), ::unsetenv("NOTIFY_SOCKET");
        g_log.level = std::max(g_log.level, Level::Warning);
    }
    return {};
}

/// Takes over inherited sockets or else binds all addresses; --check-config needs none of them.
Error bind_all(const Config& config, std::list<Listener>& listeners) {
    for (string_view rest = config.sockets; !rest.empty();) {
        int64_t fd;
        parse_number(cut(rest, ':'), fd);
        Listener& made = listeners.emplace_back();
        if (Error error = describe(Fd(static_cast<int>(fd)), made)) { return error; }
        parse_number(cut(rest, ':'), made.bound_at);
    }
    if (config.check_config) { listeners.clear(); }
    for (const string& text : config.bind) {
        Address address;
        if (Error error = parse_address(text, address)) { return error; }
        if (config.check_config || !config.sockets.empty()) { continue; }
        Listener& made = listeners.emplace_back();
        Error error;
        for (int tries = 0; (error = bind_address(address, config, made)); ++tries) {
            if (errno != EADDRINUSE || tries == 2) { return error; }
            ::sleep(1);  // a master may have been killed; its workers leave within a second
        }
    }
    return {};
}

}  // namespace

int main(int argc, char** argv) {
    int null = 0;  // open 0, 1 and 2 if they are closed, lest a socket get such a number
    while (null >= 0 && null <= STDERR_FILENO) { null = ::open("/dev/null", O_RDWR); }
    ::close(null);  // -1, which does no harm, if there is no /dev/null
    set_signals({SIGPIPE, SIGXFSZ}, SIG_IGN);
    Config config;
    config.directory = current_directory();
    config.argv = Strings(argv, argv + argc);
    std::list<Listener> listeners;
    Error error = parse_command_line({argv + std::min(argc, 1), argv + argc}, config);
    if (!error && config.help) { return print_help(), 0; }
    if (!error && config.version) { return std::puts((string("server ") + kVersion).c_str()), 0; }
    if (!error && config.print_config) { return std::puts(show_config(config).c_str()), 0; }
    if (!error) { error = apply(config); }
    if (!error) { error = bind_all(config, listeners); }
    if (!error && config.daemon && !config.detached) { error = daemonize(config); }
    if (error) {
        if (config.old_master == 0) { unlink_sockets(listeners); }
        return std::fputs(("Error: " + error.text + "\n").c_str(), stderr), error.code;
    }
    make_title_room(config, argv, argc);
    return Arbiter(config, listeners).run();
}
