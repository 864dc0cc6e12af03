/* Kills its own process at the n-th change of a file under a folder. Preloaded by crash_harness.py; tests only.
 *
 * Every libc call that changes a file is counted, from Python and from Rust alike. In torn mode a write that is
 * due to be the last one is done by half first.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static char root[PATH_MAX];
static long at = -1, seen = 0;
static int torn = 0;

void killer_arm(const char *folder, long number, int tear) {
    strncpy(root, folder, sizeof root - 1);
    seen = 0;
    torn = tear;
    at = number;
}

long killer_seen(void) { return seen; }

static int inside(const char *path) { return root[0] && path && strncmp(path, root, strlen(root)) == 0; }

static int fd_inside(int fd) {
    char link[64], path[PATH_MAX];
    if (!root[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size <= 0) return 0;
    path[size] = 0;
    return inside(path);
}

/* Counts one step; returns whether it is the last one. */
static int due(void) { return __atomic_add_fetch(&seen, 1, __ATOMIC_SEQ_CST) == at; }

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define STEP(condition) do { if ((condition) && due()) die(); } while (0)
#define WRITES(flags) ((flags) & (O_CREAT | O_WRONLY | O_RDWR | O_TRUNC))
#define MODE(flags) mode_t mode = 0; if ((flags) & (O_CREAT | O_TMPFILE)) { va_list a; va_start(a, flags); mode = va_arg(a, mode_t); va_end(a); }

int open(const char *p, int flags, ...) { REAL(open); MODE(flags) STEP(WRITES(flags) && inside(p)); return real(p, flags, mode); }
int open64(const char *p, int flags, ...) { REAL(open64); MODE(flags) STEP(WRITES(flags) && inside(p)); return real(p, flags, mode); }
int openat(int d, const char *p, int flags, ...) { REAL(openat); MODE(flags) STEP(WRITES(flags) && inside(p)); return real(d, p, flags, mode); }
int openat64(int d, const char *p, int flags, ...) { REAL(openat64); MODE(flags) STEP(WRITES(flags) && inside(p)); return real(d, p, flags, mode); }
int rename(const char *a, const char *b) { REAL(rename); STEP(inside(a) || inside(b)); return real(a, b); }
int renameat(int x, const char *a, int y, const char *b) { REAL(renameat); STEP(inside(a) || inside(b)); return real(x, a, y, b); }
int link(const char *a, const char *b) { REAL(link); STEP(inside(b)); return real(a, b); }
int linkat(int x, const char *a, int y, const char *b, int f) { REAL(linkat); STEP(inside(b)); return real(x, a, y, b, f); }
int unlink(const char *p) { REAL(unlink); STEP(inside(p)); return real(p); }
int unlinkat(int d, const char *p, int f) { REAL(unlinkat); STEP(inside(p) || (p && p[0] != '/' && fd_inside(d))); return real(d, p, f); }
int rmdir(const char *p) { REAL(rmdir); STEP(inside(p)); return real(p); }
int mkdir(const char *p, mode_t m) { REAL(mkdir); STEP(inside(p)); return real(p, m); }
int fsync(int fd) { REAL(fsync); STEP(fd_inside(fd)); return real(fd); }
int fdatasync(int fd) { REAL(fdatasync); STEP(fd_inside(fd)); return real(fd); }
int ftruncate64(int fd, off64_t n) { REAL(ftruncate64); STEP(fd_inside(fd)); return real(fd, n); }
int utimensat(int d, const char *p, const struct timespec t[2], int f) { REAL(utimensat); STEP(inside(p)); return real(d, p, t, f); }
ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    if (fd_inside(fd) && due()) {
        if (torn) real(fd, data, size / 2);
        die();
    }
    return real(fd, data, size);
}
