# make          build ./server
# make test     build and run all tests (also: make check)
# make asan     the unit tests, and the server in all others, under the sanitizers
# make coverage how much of server.cpp the tests run; the lines they do not: .ci/coverage -v
# make bench    this server beside the peers that are installed (wrk makes the load)
# make install  to $(DESTDIR)$(PREFIX)/bin; make uninstall removes it
# make static   build ./server without shared libraries
# make fuzz     the parsers under libFuzzer (clang), for FUZZ_TIME seconds; seeds are the tests' cases
# make clean    remove what was built
# make help     print these lines
#
# CXX, CXXFLAGS, CPPFLAGS, LDFLAGS and LDLIBS are yours: make CXX=clang++ CXXFLAGS=-Os
# ARGS are doctest's, and choose among the tests: make test ARGS=-ts=http
CXX ?= g++
CXXFLAGS ?= -O2 -g -Wall -Wextra -Wpedantic -Wshadow -Wconversion

# What the code needs, whatever the flags above say; on 32 bits, files of more than 2 GiB and times
# after 2038. Nothing unwinds: the tables for it would be a tenth of the program. No threads.
STANDARD = -std=c++17 -D_FILE_OFFSET_BITS=64 -D_TIME_BITS=64
BUILD = $(CXX) $(STANDARD) -fno-exceptions -fno-rtti -fno-asynchronous-unwind-tables \
    -fno-threadsafe-statics $(CPPFLAGS) $(CXXFLAGS)
SANITIZE = -g -fno-omit-frame-pointer -fno-sanitize-recover=undefined -fsanitize=address,undefined
# The tests are not optimized: they would take longer to build than to run.
TESTS = $(CXX) $(STANDARD) $(CPPFLAGS) $(CXXFLAGS) -O0

all: server

server: server.cpp
	$(BUILD) $(LDFLAGS) -o $@ server.cpp $(LDLIBS)

test_server: test_server.cpp server.cpp
	$(TESTS) $(LDFLAGS) -o $@ test_server.cpp $(LDLIBS)

test check: server test_server
	./test_server $(ARGS)

server-asan: server.cpp
	$(BUILD) $(SANITIZE) $(LDFLAGS) -o $@ server.cpp $(LDLIBS)

test_server-asan: test_server.cpp server.cpp
	$(TESTS) $(SANITIZE) $(LDFLAGS) -o $@ test_server.cpp $(LDLIBS)

asan: server-asan test_server-asan test_server
	./test_server-asan -ts=unit
	SERVER=./server-asan ./test_server $(ARGS)

coverage:
	.ci/coverage

bench: server
	.ci/bench

static: server.cpp
	$(BUILD) -static $(LDFLAGS) -o server server.cpp $(LDLIBS)

PREFIX ?= /usr/local
install: server
	install -d "$(DESTDIR)$(PREFIX)/bin"
	install -m 755 server "$(DESTDIR)$(PREFIX)/bin/server"

uninstall:
	rm -f "$(DESTDIR)$(PREFIX)/bin/server"

FUZZ_TIME ?= 60
fuzz-server: test_server.cpp server.cpp
	clang++ $(STANDARD) -fno-exceptions -fno-rtti -DFUZZ -O1 $(SANITIZE),fuzzer -o $@ test_server.cpp

fuzz: test_server fuzz-server
	mkdir -p .fuzz/seeds .fuzz/found
	FUZZ_SEEDS=.fuzz/seeds ./test_server -ts=unit
	./fuzz-server -max_total_time=$(FUZZ_TIME) -max_len=4096 -artifact_prefix=.fuzz/ .fuzz/found .fuzz/seeds

clean:
	rm -rf server server-asan test_server test_server-asan fuzz-server .fuzz .coverage __pycache__

help:
	@sed -n '/^[^#]/q; s/^# \{0,1\}//p' Makefile

.PHONY: all test check asan coverage bench static install uninstall fuzz clean help
