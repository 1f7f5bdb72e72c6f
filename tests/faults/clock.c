/* A time of day that is ahead by as many seconds as the file $CLOCK_AHEAD says, for processes that
   load this first (LD_PRELOAD). Setting the machine's own clock would set everybody's. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long ahead(void) {
    char text[32] = {0};
    const char *name = getenv("CLOCK_AHEAD");
    int kept = errno;
    int file = syscall(SYS_openat, AT_FDCWD, name ? name : "", O_RDONLY | O_CLOEXEC);
    if (file >= 0) {
        if (syscall(SYS_read, file, text, sizeof text - 1) < 0)
            text[0] = 0;
        syscall(SYS_close, file);
    }
    errno = kept;
    return atol(text);
}

int clock_gettime(clockid_t id, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, id, now);
    if (!failed && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE))
        now->tv_sec += ahead();
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec real;
    int failed = clock_gettime(CLOCK_REALTIME, &real);
    (void)zone;
    now->tv_sec = real.tv_sec;
    now->tv_usec = real.tv_nsec / 1000;
    return failed;
}

time_t time(time_t *kept) {
    struct timespec real;
    clock_gettime(CLOCK_REALTIME, &real);
    if (kept)
        *kept = real.tv_sec;
    return real.tv_sec;
}

/* Who waits until a time of day waits by the kernel's clock, which is not ahead. */

int sem_timedwait(sem_t *restrict semaphore, const struct timespec *restrict until) {
    int (*waits)(sem_t *, const struct timespec *) = dlsym(RTLD_NEXT, "sem_timedwait");
    struct timespec there = *until;
    there.tv_sec -= ahead();
    return waits(semaphore, &there);
}

int pthread_cond_timedwait(
    pthread_cond_t *restrict changed, pthread_mutex_t *restrict lock,
    const struct timespec *restrict until
) {
    int (*waits)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *) =
        dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
    struct timespec there = *until, boot, day;
    syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &boot);
    clock_gettime(CLOCK_REALTIME, &day);
    /* Some conditions wait by the time since boot: theirs is nearer to that one. */
    if (labs(there.tv_sec - day.tv_sec) < labs(there.tv_sec - boot.tv_sec))
        there.tv_sec -= ahead();
    return waits(changed, lock, &there);
}
