/* Faults at system calls, for the crash test: LD_PRELOAD it, then arm it through ctypes before a fork.
 *
 * Calls that change something under one folder are counted over all processes of a case (shared memory). At the n-th
 * one the case's process group is killed before the call, in the middle of it (half of the bytes of a write) or after
 * it; or the call fails with an errno, once or from there on. The process that armed it is never counted.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OFF, KILL_BEFORE, KILL_MIDDLE, KILL_AFTER, FAIL_ONCE, FAIL_ON };

struct shared {
    atomic_long count;
    atomic_long fired;
    char what[256];
};

static struct shared *shared;
static char prefix[PATH_MAX];
static size_t prefix_length;
static int mode, failure;
static long at;
static pid_t owner;

void crash_arm(const char *folder, int how, long n, int error) {
    if (!shared) {
        shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    }
    memset(shared, 0, sizeof *shared);
    strncpy(prefix, folder, sizeof prefix - 1);
    prefix_length = strlen(prefix);
    mode = how, at = n, failure = error, owner = getpid();
}
long crash_count(void) { return shared ? atomic_load(&shared->count) : 0; }
long crash_fired(void) { return shared ? atomic_load(&shared->fired) : 0; }
const char *crash_what(void) { return shared ? shared->what : ""; }

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static int ours(const char *path) {
    return shared && prefix_length && getpid() != owner && path && strncmp(path, prefix, prefix_length) == 0;
}

static int of_file(int fd, char *path) {
    char link[64];
    if (!shared || !prefix_length || fd <= 2) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, PATH_MAX - 1);
    if (n <= 0) return 0;
    path[n] = 0;
    return ours(path);
}

static void at_folder(int folder, const char *path, char *whole) {
    if (path[0] == '/' || folder == AT_FDCWD) {
        snprintf(whole, PATH_MAX, "%s", path);
        return;
    }
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t n = readlink(link, whole, PATH_MAX - 1);
    if (n < 0) n = 0;
    snprintf(whole + n, PATH_MAX - n, "/%s", path);
}

static void die(void) {
    kill(0, SIGKILL);
    for (;;) pause();
}

/* What to do with this call: 0 let it pass, -1 it fails with errno, 1 kill in its middle, 2 kill after it. */
static int meet(const char *call, const char *path) {
    long n = atomic_fetch_add(&shared->count, 1) + 1;
    int now = n == at || (mode == FAIL_ON && n > at);
    if (mode == OFF || !now) return 0;
    if (n == at) {
        snprintf(shared->what, sizeof shared->what, "%s %s", call, path + prefix_length);
        atomic_store(&shared->fired, 1);
    }
    switch (mode) {
    case KILL_BEFORE: die(); return 0;
    case KILL_MIDDLE: return 1;
    case KILL_AFTER: return 2;
    default: errno = failure; return -1;
    }
}

#define AROUND(call, path, type, expression) \
    do { \
        int verdict_ = meet(call, path); \
        if (verdict_ < 0) return -1; \
        type result_ = (expression); \
        if (verdict_ > 0) die(); \
        return result_; \
    } while (0)

static int opens(const char *path, int flags) { return (flags & (O_CREAT | O_TRUNC)) && ours(path); }

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); \
        va_list list; \
        va_start(list, flags); \
        mode_t bits = flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0; \
        va_end(list); \
        if (!opens(path, flags)) return real(path, flags, bits); \
        AROUND(#name, path, int, real(path, flags, bits)); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        REAL(name); \
        va_list list; \
        va_start(list, flags); \
        mode_t bits = flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0; \
        va_end(list); \
        if (!shared || !(flags & (O_CREAT | O_TRUNC))) return real(folder, path, flags, bits); \
        char whole[PATH_MAX]; \
        at_folder(folder, path, whole); \
        if (!ours(whole)) return real(folder, path, flags, bits); \
        AROUND(#name, whole, int, real(folder, path, flags, bits)); \
    }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name) \
    FILE *name(const char *path, const char *how) { \
        REAL(name); \
        if (!ours(path) || how[0] == 'r') return real(path, how); \
        int verdict = meet(#name, path); \
        if (verdict < 0) return NULL; \
        FILE *file = real(path, how); \
        if (verdict > 0) die(); \
        return file; \
    }
FOPEN(fopen)
FOPEN(fopen64)

ssize_t write(int fd, const void *bytes, size_t size) {
    REAL(write);
    char path[PATH_MAX];
    if (!of_file(fd, path)) return real(fd, bytes, size);
    int verdict = meet("write", path);
    if (verdict < 0) return -1;
    ssize_t done = real(fd, bytes, verdict == 1 ? size / 2 : size);
    if (verdict > 0) die();
    return done;
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(writev);
    char path[PATH_MAX];
    if (!of_file(fd, path)) return real(fd, parts, count);
    int verdict = meet("writev", path);
    if (verdict < 0) return -1;
    ssize_t done = real(fd, parts, verdict == 1 ? count / 2 : count);
    if (verdict > 0) die();
    return done;
}

#define PWRITE(name, offset_type) \
    ssize_t name(int fd, const void *bytes, size_t size, offset_type offset) { \
        REAL(name); \
        char path[PATH_MAX]; \
        if (!of_file(fd, path)) return real(fd, bytes, size, offset); \
        int verdict = meet(#name, path); \
        if (verdict < 0) return -1; \
        ssize_t done = real(fd, bytes, verdict == 1 ? size / 2 : size, offset); \
        if (verdict > 0) die(); \
        return done; \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

int rename(const char *from, const char *to) {
    REAL(rename);
    if (!ours(to)) return real(from, to);
    AROUND("rename", to, int, real(from, to));
}

int renameat(int a, const char *from, int b, const char *to) {
    REAL(renameat);
    char whole[PATH_MAX];
    at_folder(b, to, whole);
    if (!ours(whole)) return real(a, from, b, to);
    AROUND("renameat", whole, int, real(a, from, b, to));
}

int mkdir(const char *path, mode_t bits) {
    REAL(mkdir);
    if (!ours(path)) return real(path, bits);
    AROUND("mkdir", path, int, real(path, bits));
}

int unlink(const char *path) {
    REAL(unlink);
    if (!ours(path)) return real(path);
    AROUND("unlink", path, int, real(path));
}

int unlinkat(int folder, const char *path, int flags) {
    REAL(unlinkat);
    char whole[PATH_MAX];
    at_folder(folder, path, whole);
    if (!ours(whole)) return real(folder, path, flags);
    AROUND("unlinkat", whole, int, real(folder, path, flags));
}

int rmdir(const char *path) {
    REAL(rmdir);
    if (!ours(path)) return real(path);
    AROUND("rmdir", path, int, real(path));
}

int fsync(int fd) {
    REAL(fsync);
    char path[PATH_MAX];
    if (!of_file(fd, path)) return real(fd);
    AROUND("fsync", path, int, real(fd));
}

#define FTRUNCATE(name, length_type) \
    int name(int fd, length_type length) { \
        REAL(name); \
        char path[PATH_MAX]; \
        if (!of_file(fd, path)) return real(fd, length); \
        AROUND(#name, path, int, real(fd, length)); \
    }
FTRUNCATE(ftruncate, off_t)
FTRUNCATE(ftruncate64, off64_t)
