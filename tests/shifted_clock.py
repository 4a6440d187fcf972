"""A wall clock that jumps, for a process and all it starts: a library to preload, compiled on the spot.

Only CLOCK_REALTIME moves, as when somebody sets the clock of a machine; the monotonic clock and all waiting go on. (libfaketime 0.9.10
cannot do this for Python 3.11: with FAKETIME_DONT_FAKE_MONOTONIC, `time.sleep` fails with EINVAL.)
"""

import mmap
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile int64_t none = 0, *shift = &none;
static int (*real_clock_gettime)(clockid_t, struct timespec *);

__attribute__((constructor)) static void attach(void) {
    real_clock_gettime = dlsym(RTLD_NEXT, "clock_gettime");
    const char *path = getenv("SHIFTED_CLOCK");
    int file = path ? open(path, O_RDONLY) : -1;
    if (file < 0) return;
    void *mapped = mmap(0, 8, PROT_READ, MAP_SHARED, file, 0);
    if (mapped != MAP_FAILED) shift = mapped;
    close(file);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    if (!real_clock_gettime) real_clock_gettime = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real_clock_gettime(clock, now);
    if (!result && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += *shift;
    return result;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec precise;
    int result = clock_gettime(CLOCK_REALTIME, &precise);
    if (now) { now->tv_sec = precise.tv_sec; now->tv_usec = precise.tv_nsec / 1000; }
    return result;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
"""


class ShiftedClock:
    """Skips the test where no C compiler is."""

    def __init__(self, folder: Path):
        compiler = shutil.which("cc")
        if compiler is None:
            pytest.skip("no C compiler (cc) to make a clock that jumps")
        source, library, value = folder / "clock.c", folder / "clock.so", folder / "clock.shift"
        source.write_text(SOURCE)
        subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", str(library), str(source), "-ldl"], check=True)
        value.write_bytes(bytes(8))
        self.environment = {"LD_PRELOAD": str(library), "SHIFTED_CLOCK": str(value)}
        with value.open("r+b") as file:
            self._mapped = mmap.mmap(file.fileno(), 8)

    def shift(self, seconds: int) -> None:
        """Set the wall clock so many seconds beside the real one, everywhere at once."""
        self._mapped[:] = struct.pack("q", seconds)
