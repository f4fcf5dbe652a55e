/* Preloaded into a process: fsync takes as long as on a disk that writes SLOW_DISK megabytes per second, one file after the other. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <time.h>

static pthread_mutex_t disk = PTHREAD_MUTEX_INITIALIZER;

static int slowly(const char *name, int fd) {
    struct stat about;
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    if (fstat(fd, &about) == 0 && getenv("SLOW_DISK")) {
        double seconds = about.st_size / (1e6 * atof(getenv("SLOW_DISK")));
        struct timespec rest = {(time_t)seconds, (long)(1e9 * (seconds - (time_t)seconds))};
        pthread_mutex_lock(&disk);
        nanosleep(&rest, NULL);
        pthread_mutex_unlock(&disk);
    }
    return real(fd);
}

int fsync(int fd) { return slowly("fsync", fd); }
int fdatasync(int fd) { return slowly("fdatasync", fd); }
