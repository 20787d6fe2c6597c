/* Makes system calls fail, as file systems of clusters do.
 *
 * CKPTX_SHIM is a list "CALL:ERRNO,...": every such call fails, fsync and rename of directories
 * alone ("fsyncdir", "renamedir"). "statvfs:0" answers with zeros. CKPTX_SHIM_LOG gets a line for
 * every write of one byte.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int fault(const char *call)
{
    const char *list = getenv("CKPTX_SHIM");
    size_t length = strlen(call);
    for (const char *at = list; at && *at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL)
        if (!strncmp(at, call, length) && at[length] == ':')
            return atoi(at + length + 1);
    return -1;
}

#define FAIL(call) do { int code = fault(call); if (code > 0) { errno = code; return -1; } } while (0)

int fallocate(int fd, int mode, off_t offset, off_t size)
{
    FAIL("fallocate");
    return REAL(fallocate)(fd, mode, offset, size);
}

int fallocate64(int fd, int mode, off64_t offset, off64_t size)
{
    FAIL("fallocate");
    return REAL(fallocate64)(fd, mode, offset, size);
}

int flock(int fd, int operation)
{
    FAIL("flock");
    return REAL(flock)(fd, operation);
}

int fsync(int fd)
{
    struct stat status;
    if (!fstat(fd, &status) && S_ISDIR(status.st_mode))
        FAIL("fsyncdir");
    return REAL(fsync)(fd);
}

int statvfs(const char *path, struct statvfs *found)
{
    FAIL("statvfs");
    if (fault("statvfs") == 0)
        return memset(found, 0, sizeof *found), 0;
    return REAL(statvfs)(path, found);
}

int statvfs64(const char *path, struct statvfs64 *found)
{
    FAIL("statvfs");
    if (fault("statvfs") == 0)
        return memset(found, 0, sizeof *found), 0;
    return REAL(statvfs64)(path, found);
}

int renameat2(int from, const char *old, int to, const char *new, unsigned int flags)
{
    FAIL("renameat2");
    return REAL(renameat2)(from, old, to, new, flags);
}

int rename(const char *old, const char *new)
{
    struct stat status;
    if (!lstat(old, &status) && S_ISDIR(status.st_mode))
        FAIL("renamedir");
    if (strstr(new, "latest_checkpointed_iteration.txt"))
        FAIL("pointer");
    return REAL(rename)(old, new);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset)
{
    const char *log = getenv("CKPTX_SHIM_LOG");
    if (size == 1 && log) {
        int out = open(log, O_WRONLY | O_CREAT | O_APPEND, 0644);
        (void)!write(out, "byte\n", 5);
        close(out);
    }
    return REAL(pwrite64)(fd, data, size, offset);
}
