/* Preloaded into the service: keeps a record of what it does to the journal, in one order, and can
 * make fsync fail. POWER_JOURNAL names the journal; POWER_RECORD the record, if one is kept; while
 * the file POWER_EIO exists, each fsync of the journal fails with EIO.
 *
 * An entry is: kind, number of the file, offset, length (4 x 8 bytes), then as many bytes.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { DIRECTORY = 1, MAIN, WAL, ROLLBACK, ACKNOWLEDGED }; /* the files; 0 is any other */
enum { OPENED = 1, WRITTEN, TRUNCATED, SYNCED, UNLINKED };

#define MAX_FD 65536
static unsigned char files[MAX_FD]; /* which file a descriptor is open on */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int record = -1;

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = dlsym(RTLD_NEXT, name)

static int which(const char *path) {
    static char directory[PATH_MAX];
    const char *journal = getenv("POWER_JOURNAL");
    if (!journal || !path) return 0;
    size_t length = strlen(journal);
    if (!*directory) {
        strcpy(directory, journal);
        *strrchr(directory, '/') = 0;
    }
    if (!strcmp(path, directory)) return DIRECTORY;
    if (strncmp(path, journal, length)) return 0;
    if (!path[length]) return MAIN;
    if (!strcmp(path + length, "-wal")) return WAL;
    if (!strcmp(path + length, "-journal")) return ROLLBACK;
    if (!strcmp(path + length, ".acknowledged")) return ACKNOWLEDGED;
    return 0;
}

static int file_of(int fd) { return fd >= 0 && fd < MAX_FD ? files[fd] : 0; }

static void note(int kind, int file, int64_t offset, const void *bytes, int64_t length) {
    int64_t head[4] = {kind, file, offset, length};
    struct iovec parts[2] = {{head, sizeof head}, {(void *)bytes, bytes ? (size_t)length : 0}};
    if (record < 0 && getenv("POWER_RECORD"))
        record = (int)syscall(SYS_openat, AT_FDCWD, getenv("POWER_RECORD"),
                              O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (record >= 0 && writev(record, parts, 2) < 0) abort();
}

static int opened(int fd, const char *path) {
    if (fd >= 0 && fd < MAX_FD && (files[fd] = (unsigned char)which(path))) {
        pthread_mutex_lock(&lock);
        note(OPENED, files[fd], 0, NULL, 0);
        pthread_mutex_unlock(&lock);
    }
    return fd;
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(int, #name, const char *, int, ...); \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
        return opened(real(path, flags, mode), path); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int at, const char *path, int flags, ...) { \
        REAL(int, #name, int, const char *, int, ...); \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
        return opened(real(at, path, flags, mode), path); \
    }
OPENAT(openat)
OPENAT(openat64)

int close(int fd) {
    REAL(int, "close", int);
    if (file_of(fd)) files[fd] = 0;
    return real(fd);
}

#define PWRITE(name, offset_type) \
    ssize_t name(int fd, const void *bytes, size_t length, offset_type offset) { \
        REAL(ssize_t, #name, int, const void *, size_t, offset_type); \
        if (!file_of(fd)) return real(fd, bytes, length, offset); \
        pthread_mutex_lock(&lock); \
        ssize_t done = real(fd, bytes, length, offset); \
        if (done > 0) note(WRITTEN, files[fd], offset, bytes, done); \
        pthread_mutex_unlock(&lock); \
        return done; \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t write(int fd, const void *bytes, size_t length) {
    REAL(ssize_t, "write", int, const void *, size_t);
    if (!file_of(fd)) return real(fd, bytes, length);
    pthread_mutex_lock(&lock);
    off64_t offset = lseek64(fd, 0, SEEK_CUR);
    ssize_t done = real(fd, bytes, length);
    if (done > 0) note(WRITTEN, files[fd], offset, bytes, done);
    pthread_mutex_unlock(&lock);
    return done;
}

#define TRUNCATE(name, size_type) \
    int name(int fd, size_type size) { \
        REAL(int, #name, int, size_type); \
        if (!file_of(fd)) return real(fd, size); \
        pthread_mutex_lock(&lock); \
        int failed = real(fd, size); \
        if (!failed) note(TRUNCATED, files[fd], size, NULL, 0); \
        pthread_mutex_unlock(&lock); \
        return failed; \
    }
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, off64_t)

#define SYNC(name) \
    int name(int fd) { \
        REAL(int, #name, int); \
        if (!file_of(fd)) return real(fd); \
        if (getenv("POWER_EIO") && !access(getenv("POWER_EIO"), F_OK)) { errno = EIO; return -1; } \
        pthread_mutex_lock(&lock); \
        int failed = real(fd); \
        if (!failed) note(SYNCED, files[fd], 0, NULL, 0); \
        pthread_mutex_unlock(&lock); \
        return failed; \
    }
SYNC(fsync)
SYNC(fdatasync)

int unlink(const char *path) {
    REAL(int, "unlink", const char *);
    pthread_mutex_lock(&lock);
    int failed = real(path);
    if (!failed && which(path)) note(UNLINKED, which(path), 0, NULL, 0);
    pthread_mutex_unlock(&lock);
    return failed;
}
