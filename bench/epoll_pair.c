/* The floor of any network block protocol: two small programs over one loopback TCP connection.
 *
 *     epoll_pair read|write DEPTH SECONDS PAYLOAD
 *
 * A request is 64 bytes, for a write followed by the payload; an answer is 64 bytes, for a read
 * followed by the payload. DEPTH requests are outstanding. Behind the server there is no storage but
 * 256 MiB of memory, filled before the clock starts, that payloads are copied into or out of at
 * random places. Both ends batch: one receive call takes what is there, one send call answers it.
 * Prints one JSON object: operations, seconds, and the CPU seconds of client and server, which are
 * processes of their own (user and system time, from getrusage, the filling taken off).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { HEADER = 64, BUFFER = 1 << 20, DEPTH_MAX = 256, PAYLOAD_MAX = 64 << 10, AREA = 256 << 20 };

/* Bytes received and not used, or made and not sent. Whole messages are appended; what is at the
 * front leaves; the rest is moved down when the end is near. */
struct queue {
    char *bytes;
    size_t start, end, size;
};

static char payload[PAYLOAD_MAX];
static char *area;
/* Shared with the parent: CPU seconds of the server when its area was full. */
static volatile double *filled_at;
static size_t payload_bytes;
static int is_write;

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static void make_queue(struct queue *q)
{
    /* Never full: at most DEPTH_MAX messages and one buffer beyond them. */
    q->size = (size_t)DEPTH_MAX * (HEADER + PAYLOAD_MAX) + 2 * BUFFER;
    q->bytes = malloc(q->size);
    if (!q->bytes)
        fail("malloc");
    q->start = q->end = 0;
}

static void make_room(struct queue *q, size_t wanted)
{
    if (q->start == q->end)
        q->start = q->end = 0;
    if (q->size - q->end < wanted) {
        memmove(q->bytes, q->bytes + q->start, q->end - q->start);
        q->end -= q->start;
        q->start = 0;
    }
    if (q->size - q->end < wanted)
        exit(3); /* the peer has broken the protocol */
}

static void append(struct queue *q, const char *header, const char *with_payload)
{
    size_t bytes = HEADER + (with_payload ? payload_bytes : 0);
    make_room(q, bytes);
    memcpy(q->bytes + q->end, header, HEADER);
    if (with_payload)
        memcpy(q->bytes + q->end + HEADER, with_payload, payload_bytes);
    q->end += bytes;
}

/* Send what the socket takes. */
static void drain(int fd, struct queue *q)
{
    while (q->start < q->end) {
        ssize_t count = send(fd, q->bytes + q->start, q->end - q->start, MSG_NOSIGNAL);
        if (count < 0) {
            if (errno == EAGAIN)
                return;
            fail("send");
        }
        q->start += (size_t)count;
    }
}

/* Receive once; 0 at the end of the stream, -1 when nothing is there. */
static ssize_t fill(int fd, struct queue *q)
{
    make_room(q, BUFFER);
    ssize_t count = recv(fd, q->bytes + q->end, BUFFER, 0);
    if (count > 0)
        q->end += (size_t)count;
    else if (count < 0 && errno != EAGAIN)
        fail("recv");
    return count;
}

static int wait_ready(int set)
{
    struct epoll_event event;
    return epoll_wait(set, &event, 1, -1);
}

static int watch(int fd)
{
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET};
    int one = 1, set = epoll_create1(EPOLL_CLOEXEC);
    if (set < 0 || epoll_ctl(set, EPOLL_CTL_ADD, fd, &event))
        fail("epoll");
    if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one))
        fail("TCP_NODELAY");
    return set;
}

static double cpu_of(int who);

static void serve(int listener)
{
    area = malloc(AREA);
    if (!area)
        fail("malloc");
    memset(area, 0x5a, AREA);
    *filled_at = cpu_of(RUSAGE_SELF);
    int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0)
        fail("accept");
    int set = watch(fd);
    struct queue in, out;
    make_queue(&in);
    make_queue(&out);
    for (;;) {
        wait_ready(set);
        ssize_t count;
        while ((count = fill(fd, &in)) > 0) {
            size_t request = HEADER + (is_write ? payload_bytes : 0);
            while (in.end - in.start >= request) {
                char *header = in.bytes + in.start;
                uint64_t place;
                memcpy(&place, header + 32, sizeof place);
                char *found = area + place % (AREA - PAYLOAD_MAX);
                if (is_write)
                    memcpy(found, header + HEADER, payload_bytes);
                append(&out, header, is_write ? NULL : found);
                in.start += request;
            }
            drain(fd, &out);
            if ((size_t)count < BUFFER)
                break; /* the socket is empty: the next edge will come */
        }
        if (count == 0)
            exit(0);
        drain(fd, &out);
    }
}

static double seconds_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static double cpu_of(int who)
{
    struct rusage use;
    getrusage(who, &use);
    return (double)(use.ru_utime.tv_sec + use.ru_stime.tv_sec) +
           (double)(use.ru_utime.tv_usec + use.ru_stime.tv_usec) * 1e-6;
}

int main(int count, char **words)
{
    if (count != 5 || (strcmp(words[1], "read") && strcmp(words[1], "write"))) {
        fprintf(stderr, "usage: epoll_pair read|write DEPTH SECONDS PAYLOAD\n");
        return 2;
    }
    is_write = !strcmp(words[1], "write");
    long depth = atol(words[2]);
    double time = atof(words[3]);
    payload_bytes = (size_t)atol(words[4]);
    if (depth < 1 || depth > DEPTH_MAX || time <= 0 || time > 600 || payload_bytes < 1 ||
        payload_bytes > PAYLOAD_MAX) {
        fprintf(stderr, "epoll_pair: depth 1 to 256, 0 to 600 s, payload 1 to 65536\n");
        return 2;
    }
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof at;
    if (bind(listener, (void *)&at, sizeof at) || listen(listener, 1) ||
        getsockname(listener, (void *)&at, &length))
        fail("listen");
    filled_at = mmap(NULL, sizeof *filled_at, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
                     -1, 0);
    if (filled_at == MAP_FAILED)
        fail("mmap");
    pid_t server = fork();
    if (server < 0)
        fail("fork");
    if (server == 0)
        serve(listener);
    close(listener);

    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (connect(fd, (void *)&at, sizeof at) && errno != EINPROGRESS)
        fail("connect");
    int set = watch(fd);
    struct queue in, out;
    make_queue(&in);
    make_queue(&out);
    char header[HEADER] = {0};
    uint64_t sent = 0, done = 0, random = 88172645463325252u;
    size_t answer = HEADER + (is_write ? 0 : payload_bytes);
    int is_over = 0;
    wait_ready(set); /* connected, which the listener's queue allows before the server is ready */
    while (*filled_at == 0)
        usleep(1000);
    double begun = seconds_now(), until = begun + time;
    while (!is_over || done < sent) {
        while (!is_over && sent - done < (uint64_t)depth) {
            random ^= random << 13, random ^= random >> 7, random ^= random << 17;
            memcpy(header + 8, &sent, sizeof sent);
            memcpy(header + 32, &random, sizeof random);
            append(&out, header, is_write ? payload : NULL);
            sent++;
        }
        drain(fd, &out);
        ssize_t got = fill(fd, &in);
        if (got == 0)
            fail("the server has ended");
        if (got < 0) {
            wait_ready(set);
            continue;
        }
        while (in.end - in.start >= answer) {
            if (!is_write)
                memcpy(payload, in.bytes + in.start + HEADER, payload_bytes);
            in.start += answer;
            done++;
        }
        is_over = is_over || seconds_now() >= until;
    }
    double elapsed = seconds_now() - begun;
    close(fd);
    waitpid(server, NULL, 0);
    printf("{\"operations\": %llu, \"seconds\": %.6f, \"client_cpu_s\": %.6f, "
           "\"server_cpu_s\": %.6f}\n",
           (unsigned long long)done, elapsed, cpu_of(RUSAGE_SELF), cpu_of(RUSAGE_CHILDREN) - *filled_at);
    return 0;
}
