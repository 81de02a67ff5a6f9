// Loaded before libc (LD_PRELOAD): calls on some paths fail as those of a broken disk do.
//
// FAULT_PATH: a part of the paths that are concerned. FAULT_KIND: ENOSPC, EIO, EROFS or hang.
// FAULT_READ: reading fails, not writing. FAULT_PROCESS: only where JAX_PROCESS_ID is this.
// FAULT_FIRED: a file that is made when it has happened.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int concerns(const char *path) {
  const char *part = getenv("FAULT_PATH"), *process = getenv("FAULT_PROCESS");
  const char *mine = getenv("JAX_PROCESS_ID");
  if (!part || !path || !strstr(path, part)) return 0;
  return !process || (mine && !strcmp(mine, process));
}

// Errno of the fault; it does not return where the disk hangs.
static int fault(void) {
  const char *kind = getenv("FAULT_KIND"), *fired = getenv("FAULT_FIRED");
  if (fired) close(REAL(open)(fired, O_CREAT | O_WRONLY, 0644));
  while (!strcmp(kind, "hang")) sleep(1000);
  return !strcmp(kind, "ENOSPC") ? ENOSPC : !strcmp(kind, "EROFS") ? EROFS : EIO;
}

static int reading(void) { return getenv("FAULT_READ") != NULL; }

static int concerns_file(int file) {
  if (!getenv("FAULT_PATH")) return 0;
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length <= 0) return 0;
  path[length] = 0;
  return concerns(path);
}

#define FAIL_IF(condition) if (condition) { errno = fault(); return -1; }

// A full disk can still be looked at and opened; a read-only one cannot be opened for writing.
static int opening_fails(const char *path, int flags) {
  int writes = (flags & (O_WRONLY | O_RDWR | O_CREAT)) != 0;
  if (!concerns(path) || (flags & O_DIRECTORY)) return 0;
  return reading() ? !writes : writes;
}

#define OPEN(name) \
  int name(const char *path, int flags, ...) { \
    va_list rest; va_start(rest, flags); int mode = va_arg(rest, int); va_end(rest); \
    FAIL_IF(opening_fails(path, flags)) \
    return REAL(name)(path, flags, mode); \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
  int name(int at, const char *path, int flags, ...) { \
    va_list rest; va_start(rest, flags); int mode = va_arg(rest, int); va_end(rest); \
    FAIL_IF(opening_fails(path, flags)) \
    return REAL(name)(at, path, flags, mode); \
  }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int file, const void *from, size_t count) {
  FAIL_IF(!reading() && concerns_file(file))
  return REAL(write)(file, from, count);
}
ssize_t pwrite(int file, const void *from, size_t count, off_t at) {
  FAIL_IF(!reading() && concerns_file(file))
  return REAL(pwrite)(file, from, count, at);
}
ssize_t pwrite64(int file, const void *from, size_t count, off64_t at) {
  FAIL_IF(!reading() && concerns_file(file))
  return REAL(pwrite64)(file, from, count, at);
}
ssize_t writev(int file, const struct iovec *from, int count) {
  FAIL_IF(!reading() && concerns_file(file))
  return REAL(writev)(file, from, count);
}
ssize_t pread64(int file, void *to, size_t count, off64_t at) {
  FAIL_IF(reading() && concerns_file(file))
  return REAL(pread64)(file, to, count, at);
}
int mkdir(const char *path, mode_t mode) {
  FAIL_IF(!reading() && concerns(path))
  return REAL(mkdir)(path, mode);
}
int rename(const char *from, const char *to) {
  FAIL_IF(!reading() && concerns(to))
  return REAL(rename)(from, to);
}
