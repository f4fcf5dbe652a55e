"""The escape suite: attacks on `nash_lab.evals.sandbox`, judged from outside the box but inside a confinement of its own.

    python tests/sandbox_attacks.py LEVEL ATTACK     (started by tests/test_sandbox.py, refuses to start anywhere else)

An attack that succeeds reaches what is around the box, so that has to be disposable: new PID, IPC, mount and network namespaces, a memory and
a process limit, empty /tmp, /var/tmp and /dev/shm, a /root and a /dev of its own. Each function returns the list of what got out; an empty list is a pass."""

import ctypes, json, os, pickle, re, resource, shutil, signal, socket, subprocess, sys, threading, time
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
MARK = Path("/tmp/.nash_lab-confined")
PLAIN = 65_533  # a user without rights, for the level of people who are not the administrator
NODES = [
    f"/dev/{n}"
    for n in "sda vda mem kmsg kvm tty fuse net/tun nvidia0 nvidiactl vfio/vfio dri/card0 dri/renderD128 accel0 accel/accel0".split()
]


def mount(*args):
    subprocess.run(["mount", *map(str, args)], check=True)


def private(place, mode="1777"):
    mount("-t", "tmpfs", "-o", f"size=256m,mode={mode}", "tmpfs", place)


def devices():
    "A /dev with the nodes this machine has, and files that everyone may open in place of those it lacks"
    os.mkdir("/tmp/.dev")
    mount("--bind", "/dev", "/tmp/.dev")
    private("/dev", "755")
    for node in map(
        Path, (*NODES, "/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
    ):
        node.parent.mkdir(exist_ok=True)
        node.touch()
        node.chmod(0o666)
        if (real := Path("/tmp/.dev") / node.relative_to("/dev")).exists():
            mount("--bind", real, node)
    subprocess.run(["umount", "/tmp/.dev"], check=True)
    os.rmdir("/tmp/.dev")
    for n, name in enumerate(("stdin", "stdout", "stderr")):
        os.symlink(f"/proc/self/fd/{n}", f"/dev/{name}")
    os.symlink("/proc/self/fd", "/dev/fd")
    os.mkdir("/dev/shm")


def home_of_root(mode):
    "A /root with a file for its owner and one for everyone; Python and the checkout stay where they are"
    below = {
        place: f"/tmp/{name}"
        for place, name in ((sys.base_prefix, ".python"), (str(HERE.parent), ".checkout"))
        if os.path.realpath(place).startswith("/root/")
    }
    if "/tmp/.checkout" in below.values():
        os.mkdir("/tmp/.checkout")
        mount("--bind", HERE.parent, "/tmp/.checkout")
    private("/root", mode)
    for place, kept in below.items():
        os.makedirs(place)
        mount("--bind", kept, place)
    for n in (600, 644):
        file = Path(f"/root/planted-{n}")
        file.write_text(f"secret-root-{n}")
        file.chmod(int(str(n), 8))


def network_of_its_own():
    "A loopback device that has the metadata service's address as well, all ports open to plain users, and this machine as the name server"
    import fcntl, struct

    address = lambda name, *numbers: struct.pack(
        "16sHH4s8x", name, socket.AF_INET, 0, bytes(numbers)
    )
    with socket.socket() as s:
        fcntl.ioctl(s, 0x8914, struct.pack("16sH14x", b"lo", 0x41))  # SIOCSIFFLAGS: up, running
        fcntl.ioctl(s, 0x8916, address(b"lo:1", 169, 254, 169, 254))  # SIOCSIFADDR
        fcntl.ioctl(s, 0x891C, address(b"lo:1", 255, 255, 255, 255))  # SIOCSIFNETMASK
    Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").write_text("0")
    for name, text in {
        "resolv.conf": "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n",
        "nsswitch.conf": "hosts: files dns\n",
    }.items():
        Path("/tmp/.lib", name).write_text(text)
        if os.path.exists(f"/etc/{name}"):
            mount(
                "--bind", f"/tmp/.lib/{name}", os.path.realpath(f"/etc/{name}")
            )  # without the file this is the default


def confine(argv):
    "Runs in the new namespaces, before the suite: private places to write, a network, as a plain user if asked"
    plain, real = (
        argv[0].endswith("u"),
        os.path.realpath(getattr(sys, "_base_executable", sys.executable)),
    )
    private(
        "/dev/shm"
    )  # becomes /tmp, with the package in it, which may have been below /tmp itself
    os.mkdir("/dev/shm/.python")
    mount("--bind", sys.base_prefix, "/dev/shm/.python")
    shutil.copytree(
        HERE.parent / "nash_lab",
        "/dev/shm/.lib/nash_lab",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    os.mkdir("/dev/shm/.lib/tests")
    shutil.copy(__file__, "/dev/shm/.lib/tests")
    mount("--rbind", "/dev/shm", "/tmp")
    devices()
    home_of_root("755" if plain else "700")
    network_of_its_own()
    for place in ("/dev/shm", "/var/tmp"):
        private(place)
    MARK.touch()
    python = (
        "/tmp/.python/" + os.path.relpath(real, sys.base_prefix)
        if plain or real.startswith("/tmp/")
        else real
    )
    os.environ.update(
        PYTHONPATH="/tmp/.lib", PLANTED="secret-environment", CHECKOUT=str(HERE.parent), HOME="/tmp"
    )
    os.chdir("/")
    if plain:
        os.setgroups([])
        os.setresgid(PLAIN, PLAIN, PLAIN)
        os.setresuid(PLAIN, PLAIN, PLAIN)
    os.execv(python, [python, "-B", "/tmp/.lib/tests/sandbox_attacks.py", "run", *argv])


class Suite:
    def __init__(self, level):
        from nash_lab.evals import sandbox

        self.sandbox, self.level, self.plain = sandbox, int(level[0]), level.endswith("u")
        self.home = Path("/tmp/home")
        self.home.mkdir(mode=0o755)

    def run(self, code, tests="", **limits):
        return self.sandbox.run_python(
            code, tests, self.sandbox.Limits(level=self.level, **{"wall_s": 10.0} | limits)
        )

    def plant(self):
        "Files worth reading and changing: {path: secret}"
        tree = {
            self.home / "private": 0o600,
            self.home / "public": 0o644,
            self.home / "shared": 0o666,
            self.home / "deep/er/file": 0o644,
        }
        for path, mode in tree.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"secret-{path.name}")
            path.chmod(mode)
        for folder in (self.home, self.home / "deep", self.home / "deep/er"):
            folder.chmod(0o777)
        return {str(p): p.read_text() for p in tree}

    def snapshot(self, *folders):
        "All files in the places anybody may write to and in the package; of the top of the file system and of `folders` what a listing shows"
        found = {}
        for folder in ("/", *folders):
            for path in Path(folder).iterdir():
                s = path.lstat()
                found[str(path)] = (
                    s.st_mode,
                    s.st_uid,
                    *((s.st_size, s.st_mtime_ns) if path.is_file() or folder != "/" else ()),
                )  # in / others make folders
        for place in ("/tmp", "/var/tmp", "/dev/shm", "/dev/mqueue"):
            for path in Path(place).rglob("*"):
                if str(path).startswith("/tmp/.python"):
                    continue
                s = path.lstat()
                found[str(path)] = (
                    s.st_mode,
                    s.st_uid,
                    s.st_nlink,
                    s.st_mtime_ns,
                    path.read_bytes() if path.is_file() and not path.is_symlink() else None,
                )
        return found

    def processes(self):
        "Those alive, but for this one. The dead do not count: this is process 1, and bubblewrap leaves the burying to process 1"
        found = set()
        for p in filter(str.isdigit, os.listdir("/proc")):
            try:
                state = Path("/proc", p, "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(p) != os.getpid() and state[0] != "Z":
                found.add(p)
        return found

    def gone(self, before, seconds=1.0):
        "Processes that are still here after a while"
        for _ in range(int(seconds * 20)):
            if not (left := self.processes() - before):
                return []
            time.sleep(0.05)
        return [
            f"process left: {Path('/proc', p, 'cmdline').read_bytes()[:60]}"
            for p in left
            if Path("/proc", p).exists()
        ]

    @contextmanager
    def most(self, measure):
        "A list of one number: the greatest that `measure()` gives every 10 ms while the block runs"
        most, stop = [0], threading.Event()

        def watch():
            while not stop.wait(0.01):
                most[0] = max(most[0], measure())

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield most
        finally:
            stop.set()
            watcher.join()

    def slack(self):
        "Seconds that a box may start and end late on this machine now: ten starts of an interpreter, which no fault of a box makes longer"
        start = time.monotonic()
        for _ in range(5):
            subprocess.run([sys.executable, "-S", "-c", ""], check=True)
        return 2 * (time.monotonic() - start)

    def status(self):
        "What /proc says of each living process but this one: dictionaries of words"
        for p in self.processes():
            try:
                yield {
                    key: words.split()
                    for key, words in (
                        line.split(":", 1)
                        for line in Path("/proc", p, "status").read_text().splitlines()
                    )
                }
            except OSError:
                continue

    def resident(self):
        "Megabytes that all processes but this one have touched; a page that two of them share counts twice"
        return (
            sum(
                int(s[key][0]) for s in self.status() for key in ("RssAnon", "RssShmem") if key in s
            )
            >> 10
        )

    # network ---------------------------------------------------------------------------------------------------------
    def network(self):
        "TCP, UDP, a raw system call, abstract and path Unix sockets, a name server, the metadata service: listeners that hear the same code outside hear nothing"
        AF_UNIX, names = socket.AF_UNIX, {}
        for name, family, kind, where in (
            ("tcp", 2, 1, ("127.0.0.1", 0)),
            ("udp", 2, 2, ("127.0.0.1", 0)),
            ("abstract", AF_UNIX, 1, "\0nash_lab-listener"),
            ("path", AF_UNIX, 1, "/tmp/listener"),
            ("name server", 2, 2, ("127.0.0.1", 53)),
            ("name server by tcp", 2, 1, ("127.0.0.1", 53)),
            ("metadata", 2, 1, ("169.254.169.254", 80)),
        ):
            s = socket.socket(family, kind)
            s.bind(where)
            s.setblocking(False)
            if kind == 1:
                s.listen()
            names[name] = s
        os.chmod("/tmp/listener", 0o777)
        tcp, udp = (names[n].getsockname()[1] for n in ("tcp", "udp"))
        code = f"""
import ctypes, os, socket, struct
def attempt(f):
    try: f()
    except BaseException: pass
def tcp(): socket.create_connection(("127.0.0.1", {tcp}), 1).send(b"x")
def udp(): socket.socket(2, 2).sendto(b"x", ("127.0.0.1", {udp}))
def abstract(): socket.socket(1, 1).connect("\\0nash_lab-listener")
def path(): socket.socket(1, 1).connect("/tmp/listener")
def raw():
    libc = ctypes.CDLL(None)
    fd = libc.syscall(41 if os.uname().machine == "x86_64" else 198, 2, 1, 0)
    where = struct.pack("<HH4s8x", 2, socket.htons({tcp}), bytes([127, 0, 0, 1]))
    libc.connect(fd, where, 16); os.write(fd, b"x")
def pair():  # a pair is allowed, and must stay among itself
    a, b = socket.socketpair(type=2); a.sendto(b"x", "\\0nash_lab-listener")
def dns(): socket.getaddrinfo("nash-lab-resolver.example.org", 80)
def query(): socket.socket(2, 2).sendto(b"\\x12\\x34\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0\\7example\\3org\\0\\0\\1\\0\\1", ("127.0.0.1", 53))
def query_tcp(): socket.create_connection(("127.0.0.1", 53), 1).send(b"x")
def metadata(): socket.create_connection(("169.254.169.254", 80), 1).send(b"GET /latest/meta-data/ HTTP/1.0\\r\\n\\r\\n")
for f in (tcp, udp, abstract, path, raw, pair, query, query_tcp, metadata, dns): attempt(f)
"""

        def heard():
            for name, s in names.items():
                try:
                    while True:
                        yield name, s.recv(200) if s.type == socket.SOCK_DGRAM else s.accept()[1]
                except BlockingIOError:
                    pass

        r = self.run(code)
        seen = [name for name, _ in heard()]
        subprocess.run(
            [sys.executable, "-c", code], timeout=60
        )  # confined as this process is, but in no box
        outside = list(heard())
        deaf = [name for name in names if name not in dict(outside)] + ["resolver"] * (
            not any(n == "name server" and b"nash-lab-resolver" in data for n, data in outside)
        )
        return (
            seen
            + [f"no listener: {name}" for name in deaf]
            + [f"stopped early: {r.error}"] * (not r.passed)
        )

    # reading ---------------------------------------------------------------------------------------------------------
    def environment(self):
        "The parent's environment, memory, folder and root, and those of process 1; attaching to it"
        (self.home / "here").write_text("secret-here")
        (self.home / "here").chmod(0o600)
        os.chdir(self.home)
        keep = ctypes.create_string_buffer(
            b"nash_lab-memory-" + os.urandom(16).hex().encode()
        )  # of which the code knows where it is and how it begins
        r = self.run(f"""
import ctypes, os, re
libc, own = ctypes.CDLL(None, use_errno=True), os.getpid()
secret = re.compile(b"nash_lab-" + b"memory-[0-9a-f]{{32}}")
def attempt(f, *args):
    try: print(f(*args))
    except BaseException as e: print(type(e).__name__)
def memory(pid, left=256 << 20):
    with open(f"/proc/{{pid}}/mem", "rb", 0) as mem:
        print("opened", pid)
        def look(start, end):
            nonlocal left
            while start < end and left > 0:
                data = os.pread(mem.fileno(), min(end - start, 1 << 20), start)
                start, left = start + len(data), left - len(data)
                print(*secret.findall(data))
                if not data: break
        attempt(look, {ctypes.addressof(keep)}, {ctypes.addressof(keep) + 64})
        for line in open(f"/proc/{{pid}}/maps"):
            if line.split()[1][0] == "r": attempt(look, *(int(x, 16) for x in line.split()[0].split("-")))
def readv(pid):
    here = ctypes.create_string_buffer(64)
    one = lambda address: (ctypes.c_void_p * 2)(address, 64)
    words = [ctypes.c_long(n) for n in (310 if os.uname().machine == "x86_64" else 270, pid, 1, 0)]   # whole: the last one is on the stack
    got = libc.syscall(words[0], words[1], one(ctypes.addressof(here)), words[2], one({ctypes.addressof(keep)}), words[2], words[3])
    return got, os.strerror(ctypes.get_errno()), here.value
attempt(dict, os.environ)
try: others = [int(p) for p in os.listdir("/proc") if p.isdigit()]
except OSError: others = []
for pid in ("self", *({{os.getppid(), {os.getpid()}, 1, *others}} - {{own, 0}})):
    for name in ("environ", "maps", "cmdline", "cwd/here", "root{self.home}/here"): attempt(lambda: open(f"/proc/{{pid}}/{{name}}", "rb").read()[:20_000])
    for name in ("cwd", "root", "fd"): attempt(lambda: os.listdir(f"/proc/{{pid}}/{{name}}"))
    if pid == "self": continue
    attempt(memory, pid); attempt(readv, pid)
    print("traced", libc.ptrace(0x4206, pid, 0, 0) == 0)  # PTRACE_SEIZE, which stops nobody
""")
        got = r.stdout + r.stderr
        return [
            word
            for word in (
                "secret-environment",
                "secret-here",
                keep.value.decode(),
                "opened",
                "traced True",
            )
            if word in got
        ] + [f"stopped early: {r.error}"] * (not r.passed or r.truncated)

    def read_files(self):
        "Secrets of mode 600 and 644, root's home (closed and, above level 1, open to all), the users' passwords, the checkout: neither texts nor names"
        planted = (
            self.plant()
            | {
                "/etc/shadow": Path("/etc/shadow").read_text()[:200]
                if os.access("/etc/shadow", os.R_OK)
                else "root:$"
            }
            | {f"/root/planted-{n}": f"secret-root-{n}" for n in (600, 644)}
        )
        page = next(
            str(p)
            for p in (Path(os.environ["CHECKOUT"]) / "settings.ini", HERE / "sandbox_attacks.py")
            if os.access(p, os.R_OK)
        )
        planted[page] = Path(page).read_text()[:200]
        code = f"""
import os
def listed(folder):
    try: print("LISTED", os.listdir(folder))
    except OSError as e: print(e.strerror)
folders = ("/root", {str(self.home)!r}, {str(self.home / "deep/er")!r}, {str(HERE.parent)!r}, {os.environ["CHECKOUT"]!r}, "/etc")
ways = lambda path: (path, "/proc/self/root" + path, "/proc/self/cwd" + path, "/tmp/../" + path)
for path in {list(planted)!r}:
    for way in ways(path):
        try: print(open(way).read(2000))
        except OSError as e: print(e.strerror)
for folder in folders:
    for way in ways(folder): listed(way)
for fd in range(3, 64):
    listed(fd)
    for path in {list(planted)!r}:
        try: print(open(os.open("../" * 12 + path, os.O_RDONLY, dir_fd=fd)).read(2000))
        except OSError: pass
    for folder in folders:
        try: listed(os.open("../" * 12 + folder, os.O_RDONLY, dir_fd=fd))
        except OSError: pass
"""
        readable = (
            []
            if self.level > 1
            else [k for k in planted if os.stat(k).st_mode & 0o004 and not k.startswith("/root/")]
        )  # level 1: what everyone may read
        hidden, out = (
            {Path(k).name for k in planted if self.level > 1 or k.startswith("/root/")},
            [],
        )
        for mode in (
            (None,) if self.level == 1 or self.plain else (0o700, 0o755)
        ):  # a plain user finds it open
            if mode:
                os.chmod("/root", mode)
            r = self.run(code)
            names = {
                name
                for line in r.stdout.splitlines()
                if line.startswith("LISTED ")
                for name in re.findall(r"'([^']*)'", line)
            }
            out += (
                [
                    path
                    for path, secret in planted.items()
                    if secret[:60] in r.stdout and path not in readable
                ]
                + [f"the name {n}" for n in sorted(hidden & names)]
                + [f"stopped early: {r.error}"] * (not r.passed)
            )
        return out

    def descriptors(self):
        "Descriptors that this process has open, even those marked for children"
        (self.home / "open").write_text("secret-open")
        fds = [os.open(self.home / "open", os.O_RDONLY) for _ in range(30)]
        for fd in fds:
            os.set_inheritable(fd, True)
        r = self.run(
            "import os\nfor fd in range(300):\n try: print(os.pread(fd, 100, 0))\n except OSError: pass\n"
            'for fd in range(300):\n try: print(os.read(os.open(f"/proc/self/fd/{fd}", os.O_NONBLOCK), 100))\n except OSError: pass'
        )
        return ["secret-open"] if "secret-open" in r.stdout else []

    # changing --------------------------------------------------------------------------------------------------------
    def write_files(self):
        "Overwrite, append, truncate, delete, rename, link, chmod, new files in every place that is open to all"
        self.plant()
        own = self.home / "site-packages"
        own.mkdir(mode=0o777)
        own.chmod(0o777)  # of the box, and open to all
        (own / "planted_module.py").write_text("x = 1\n")
        (own / "planted_module.py").chmod(0o666)
        real = [
            p
            for p in sys.path
            if p.endswith(("site-packages", "dist-packages")) and os.path.isdir(p)
        ]
        before, packages = self.snapshot(*real), [str(own), *real]
        r = self.run(
            f"""
import ctypes, os, shutil, tempfile
home = {str(self.home)!r}
def each(*calls):
    for call in calls:
        try: call()
        except BaseException: pass
for path in (home + "/shared", home + "/public", "/tmp/.lib/nash_lab/__init__.py", {str(own)!r} + "/planted_module.py", "/proc/self/root" + home + "/shared", "/tmp/../tmp/home/shared"):
    each(lambda: open(path, "w").write("x"), lambda: open(path, "a").write("x"), lambda: open(path, "r+").write("x"), lambda: os.truncate(path, 0),
         lambda: os.chmod(path, 0), lambda: os.utime(path, (0, 0)), lambda: os.setxattr(path, "user.a", b"1"),
         lambda: os.rename(path, path + "2"), lambda: os.link(path, "/tmp/hard"), lambda: os.unlink(path), lambda: os.symlink(path, "/tmp/soft"))
each(lambda: shutil.rmtree(home), lambda: os.rmdir(home + "/deep/er"), tempfile.mkdtemp, tempfile.NamedTemporaryFile, lambda: tempfile.TemporaryFile(dir="/tmp"))
for place in ("/tmp", "/var/tmp", "/dev/shm", "/", "/tmp/.lib", "/tmp/.lib/nash_lab", home, ".", *{packages!r}):
    each(lambda: open(place + "/new", "w"), lambda: os.mkdir(place + "/folder"), lambda: os.mkfifo(place + "/fifo"), lambda: os.mknod(place + "/node"),
         lambda: open(place + "/evil.pth", "w"), lambda: os.mkdir(place + "/__pycache__"))
import sys; sys.dont_write_bytecode = False
import planted_module, py_compile; each(lambda: py_compile.compile(planted_module.__file__))
libc = ctypes.CDLL(None)
for name in (b"/tmp/c1", b"/dev/shm/c2"): each(lambda: libc.creat(name, 0o666), lambda: libc.open(name, 0o1101, 0o666), lambda: libc.shm_open(b"/c3", 0o102, 0o666))
each(lambda: __import__("multiprocessing").Lock(), lambda: os.open("/tmp", 0o20200002))
""",
            packages=(str(own),),
        )
        after = self.snapshot(*real)
        return [k for k in before.keys() | after.keys() if before.get(k) != after.get(k)] + [
            f"stopped early: {r.error}"
        ] * (not r.passed)

    def fill_disk(self):
        "A file of 1 GB, 10,000 small ones, a deep tree"
        before = self.snapshot()
        self.run("""
import os
for place in ("/tmp", "/var/tmp", "/dev/shm", ".", "/"):
    try:
        with open(place + "/big", "wb") as f:
            for _ in range(1000): f.write(bytes(1 << 20))
    except OSError: pass
    try:
        for i in range(10_000): open(f"{place}/{i}", "w").close()
    except OSError: pass
    try:
        os.chdir(place)
        for _ in range(1000): os.mkdir("d"); os.chdir("d")
    except OSError: pass
""")
        return [k for k in self.snapshot().keys() ^ before.keys()]

    def result_place(self):
        "The pipe for the verdict closed, replaced by something else, held open"
        got = []
        for name, code in {
            "closed": "os.closerange(3, 300)",
            "replaced": "r, w = os.pipe()\nfor fd in range(3, 60):\n try: os.dup2(w, fd)\n except OSError: pass",
            "stdout": "os.dup2(1, 3); os.closerange(4, 300)",
            "held": "for fd in range(3, 30):\n try: os.dup(fd)\n except OSError: pass\nos._exit(0)",
        }.items():
            start = time.monotonic()
            if self.run("import os\n" + code, "assert True", wall_s=3.0).passed:
                got.append(f"{name} passed")
            if time.monotonic() - start > 10:
                got.append(f"{name} hung")
        return got

    # processes -------------------------------------------------------------------------------------------------------
    def signals(self):
        "Signals to the parent, its group, everyone (with signal 0); stopping and renicing: a canary and this process feel nothing"
        felt = []
        for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
            signal.signal(s, lambda n, _: felt.append(f"signal {n}"))
        canary = subprocess.Popen(["sleep", "60"])
        state = lambda: (
            Path(f"/proc/{canary.pid}/stat").read_text().split()[2] in "TtZX",
            os.getpriority(os.PRIO_PROCESS, canary.pid),
            os.sched_getaffinity(canary.pid),
            resource.prlimit(canary.pid, resource.RLIMIT_NOFILE),
        )
        before = state()
        r = self.run(
            f"""
import ctypes, os, resource, signal
reached = []
def attempt(name, f):
    try: f(); reached.append(name)
    except BaseException: pass
for pid in (os.getppid(), {os.getpid()}, {canary.pid}, 1):
    if pid in (os.getpid(), 0): continue
    for s in (0, signal.SIGTERM, signal.SIGUSR1, signal.SIGSTOP): attempt(f"kill {{pid}} {{s}}", lambda: os.kill(pid, s))
    attempt(f"group {{pid}}", lambda: os.killpg(pid, signal.SIGTERM))
    attempt(f"limit {{pid}}", lambda: resource.prlimit(pid, resource.RLIMIT_NOFILE, (8, 8)))
    attempt(f"affinity {{pid}}", lambda: os.sched_setaffinity(pid, [0]))
    attempt(f"nice {{pid}}", lambda: os.setpriority(os.PRIO_PROCESS, pid, 19))
    attempt(f"pidfd {{pid}}", lambda: signal.pidfd_send_signal(os.pidfd_open(pid), signal.SIGUSR1))
    for number in (234, 200, 129): ctypes.CDLL(None).syscall(number, pid, pid, 10)
attempt("everyone", lambda: os.kill(-1, 0))
""",
            ["reached"],
        )
        time.sleep(0.1)
        if canary.poll() is not None or state() != before:
            felt.append(f"canary {canary.poll()}")
        canary.kill()
        canary.wait()
        inside = r.values[0] if r.values else [r.error]
        return felt + inside

    def forks(self):
        "A fork bomb (400 at most), forks by the C library and by number, a daemon, a child that holds the output: each call is back on time"
        slack, before, out = self.slack(), self.processes(), []
        with self.most(lambda: len(self.processes() - before)) as most:
            for code in (
                "for _ in range(400):\n try:\n  if os.fork() == 0: time.sleep(30); os._exit(0)\n except OSError: pass",
                "libc = ctypes.CDLL(None)\nfor _ in range(50):\n if libc.fork() == 0: time.sleep(30); os._exit(0)",
                "libc = ctypes.CDLL(None)\nfor n in (56, 57, 58):\n for _ in range(5):\n  if libc.syscall(n, 17, 0, 0, 0, 0) == 0: time.sleep(30); os._exit(0)",
                "if os.fork() == 0:\n os.setsid()\n if os.fork() == 0: time.sleep(30)\n os._exit(0)",
                'import subprocess; subprocess.Popen(["sleep", "30"])',
                'os.posix_spawn("/bin/sleep", ["sleep", "30"], {})',
                'os.system("sleep 30 &")',
            ):
                start = time.monotonic()
                self.run("import ctypes, os, time\n" + code, wall_s=3.0)
                if (took := time.monotonic() - start) > 6.0 + slack:
                    out.append(
                        f"{code[:40]} took {took:.1f} s"
                    )  # the limit, 2 s of patience for the pipe, 1 s
        return out + self.gone(before) + [f"{most[0]} processes at once"] * (most[0] > 6)

    def threads(self):
        "A thread bomb, with stacks as small as they get"
        before = self.processes()
        r = self.run(
            """
import threading, time
threading.stack_size(32768)
count = 0
try:
    for _ in range(3000): threading.Thread(target=time.sleep, args=(2,), daemon=True).start(); count += 1
except BaseException: pass
""",
            ["count"],
        )
        most = 0 if self.plain else 16
        return self.gone(before) + (
            [] if r.values and r.values[0] <= most else [f"{r.values or r.error} threads"]
        )

    def memory(self):
        "6 GB at once, children with 150 MB each, a huge power, a zip bomb, deep recursion: this process does not grow, all others together stay below 512 MB and 48 for what is around the box"
        out, seen, before = [], [], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for code in (
            "x = bytearray(6 << 30)",
            'x = [b"1" * (1 << 20) for _ in range(6000)]',
            'import os\nfor _ in range(12):\n if os.fork() == 0: x = b"1" * (150 << 20); import time; time.sleep(5)',
            "x = 10 ** 10 ** 8",
            'import zlib\nb = zlib.compressobj(9); d = b"".join(b.compress(bytes(1 << 20)) for _ in range(900)) + b.flush(); x = zlib.decompress(d)',
            "import sys; sys.setrecursionlimit(10 ** 9)\ndef f(): return f()\nf()",
            'x = "a" * (1 << 40)',
            "import mmap\nx = [mmap.mmap(-1, 1 << 30) for _ in range(8)]",
            'import os\nx = [os.memfd_create("a") for _ in range(9)]\nfor fd in x: os.write(fd, bytes(400 << 20))',
        ):
            with self.most(self.resident) as most:
                r = self.run(code, "assert not x", wall_s=4.0, cpu_s=4, memory_mb=512)
            seen += most
            if r.passed:
                out.append(f"{code[:30]} passed")
            if most[0] > 512 + 48:
                out.append(f"{code[:30]} took {most[0]} MB")
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        return (
            out
            + [f"nothing seen above {max(seen)} MB"] * (max(seen) < 256)
            + [f"this process grew by {grown >> 10} MB"] * (grown >> 10 > 50)
        )

    # time and output -------------------------------------------------------------------------------------------------
    def clock(self):
        "Loops, ignored signals, a regular expression in C, exit handlers, `__del__`, a thread that is waited for: over at the limit"
        out, before = [], self.processes()
        slack = self.slack()
        for code in (
            "while True: pass",
            "import signal\nfor s in range(1, 65):\n try: signal.signal(s, signal.SIG_IGN)\n except (OSError, ValueError): pass\nwhile True: pass",
            'import re; re.match("(a+)+b", "a" * 60)',
            "import time; time.sleep(100)",
            "import signal; signal.pause()",
            "import os; r, w = os.pipe(); os.read(r, 1)",
            "import atexit, time; atexit.register(time.sleep, 100)",
            "class A:\n def __del__(self):\n  while True: pass\na = A()",
            "import threading, time; threading.Thread(target=time.sleep, args=(100,)).start()",
            "import sys; sys.settrace(lambda *a: 1 / 0)",
        ):
            start = time.monotonic()
            self.run(code, wall_s=1.0)
            if (took := time.monotonic() - start) > 2.0 + slack:
                out.append(f"{code[:40]} took {took:.1f} s")
        return out + self.gone(before)

    def processor(self):
        "The limit on processor time, with the signal ignored"
        r = self.run(
            "import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
            wall_s=30.0,
            cpu_s=1,
        )
        return (
            []
            if not r.passed and r.status in ("timeout", "crashed") and r.wall_s < 25
            else [str(r)]
        )

    def output(self):
        "500 MB of output, as much to stderr, bytes that are no text: cut, flagged, no exception, no growth here"
        out, before = [], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for stream in (1, 2):
            r = self.run(
                f'import os\nfor _ in range(500): os.write({stream}, b"x" * (1 << 20))',
                output_bytes=100_000,
            )
            if not r.truncated or len(r.stdout) + len(r.stderr) != 100_000:
                out.append(f"stream {stream}: {len(r.stdout)} {len(r.stderr)} {r.truncated}")
        for data in (
            b"\0\1\2\xff\xfe",
            b"\x1b[2J\x1b]0;x\7",
            "\u20ac".encode()[:2],
            b"\xed\xa0\x80",
        ):
            r = self.run(f"import os; os.write(1, {data!r})")
            if not r.passed or not isinstance(r.stdout, str):
                out.append(repr(data))
        r = self.run('x = "y" * 5_000_000', ["x"], output_bytes=100_000)
        if r.passed:
            out.append("a verdict above the limit passed")
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        return out + [f"this process grew by {grown >> 10} MB"] * (grown >> 10 > 50)

    # the verdict -----------------------------------------------------------------------------------------------------
    def exits(self):
        "Leaving in every way, from the code and from what the tests call: never a pass"
        ways = [
            "sys.exit(0)",
            "os._exit(0)",
            "raise SystemExit",
            "exit(0)",
            "os.kill(os.getpid(), 9)",
            "os.kill(os.getpid(), 15)",
            "os.abort()",
            "ctypes.string_at(0)",
            "ctypes.CDLL(None)._exit(0)",
            "ctypes.CDLL(None).exit(0)",
            'os.execv("/bin/true", ["true"])',
            'os.execv("/proc/self/exe", ["python", "-c", ""])',
            "raise KeyboardInterrupt",
            "raise GeneratorExit",
            "sys.stdout.close(); os._exit(0)",
        ]
        out = []
        for way in ways:
            for code, tests in (
                (f"import ctypes, os, sys\n{way}", "assert False"),
                (
                    f"import ctypes, os, sys\ndef f():\n {way.replace('; ', chr(10) + ' ')}",
                    "assert f() == 1",
                ),
                (
                    f"import ctypes, os, sys\nclass A:\n def __init__(self):\n  {way.replace('; ', chr(10) + '  ')}\ndef f(): return A()",
                    {"f()": 1},
                ),
            ):
                if self.run(code, tests).passed:
                    out.append(f"{way}: {tests}")
        return out

    def forgeries(self):
        "Printed and written verdicts, wrong nonces, two verdicts, patched helpers, payloads instead of JSON: a pickle, an array of objects as NumPy stores it"
        canary = Path("/tmp/canary")

        class Payload:
            def __reduce__(self):
                return open, (str(canary), "w")

        payload = pickle.dumps(Payload(), 2)
        pickle.loads(payload).close()
        assert canary.exists()
        canary.unlink()  # it works
        header = (
            b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
        )  # with the 10 bytes before it a multiple of 64
        npy = (
            b"\x93NUMPY\x01\0"
            + len(header).to_bytes(2, "little")
            + header
            + pickle.dumps([Payload()], 2)
        )
        verdict = '{"nonce": "0", "status": "passed", "error": "", "values": []}'
        write = (
            "import os\nfor fd in range(1, 64):\n try: os.write(fd, {})\n except OSError: pass\n"
        )
        out, bad = (
            [],
            {
                "printed": f'print("PASSED"); print({verdict!r})',
                "written": write.format(repr((verdict + "\n").encode())) + "os._exit(0)",
                "two": write.format(repr((verdict + "\n").encode())),
                "no newline": write.format(repr(verdict.encode())) + "os._exit(0)",
                "pickle": write.format(repr(payload)) + "os._exit(0)",
                "pickle, line": write.format(repr(payload + b"\n")) + "os._exit(0)",
                "pickle, held": write.format(repr(payload)),
                "npy": write.format(repr(npy)) + "os._exit(0)",
                "npy, line": write.format(repr(npy + b"\n")) + "os._exit(0)",
                "npy, held": write.format(repr(npy)),
                "nan": write.format("b'{\"nonce\": NaN}\\n'") + "os._exit(0)",
                "infinite": write.format("b'{\"nonce\": 1e999}\\n'") + "os._exit(0)",
                "nested": write.format('b"[" * 100_000 + b"\\n"') + "os._exit(0)",
                "builtins": "import builtins\nbuiltins.all = builtins.abs = builtins.isinstance = lambda *a: True\nbuiltins.AssertionError = None",
                "math": "import math; math.isclose = lambda *a, **k: True",
                "own names": "def all(x): return True\nabs = lambda x: 0",
                "builtins name": '__builtins__ = {"all": lambda x: True, "__import__": __import__}',
                "trace": "import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)",
                "json": 'import json; json.dumps = lambda *a, **k: "{}"',
                "main": 'import __main__; __main__.run_candidate = lambda **k: dict(status="passed", error="", values=[]); __main__.exception_line = str',
            },
        )
        for name, code in bad.items():
            if self.run(
                code, "import math\nassert all([0]) and math.isclose(1, 2) and abs(-1) == 0"
            ).passed:
                out.append(name)
        return out + ["the payload ran"] * canary.exists()

    def values(self):
        "Values that are not plain data, or try to be more: refused, or no pass"
        out = []
        for value in (
            'float("nan")',
            "1e999",
            '{1: float("inf")}',
            'type("A", (), {"__eq__": lambda *a: True})()',
            'type("A", (int,), {"__eq__": lambda *a: True, "__hash__": int.__hash__})(3)',
            'b"42"',
            "b",
            "42 + 1",
            '"42"',
            'type("A", (), {"tolist": lambda s: 43})()',
            "True",
            "[[]] * 10",
            "(lambda f: f(f, 100_000))(lambda f, n: [n])",
        ):
            if self.run(
                f"import sys\nb = []\nfor _ in range(100_000): b = [b]\ndef f(): return {value}",
                {"f()": 42},
            ).passed:
                out.append(value)
        r = self.run(
            """
import sys, json, os
def f():
    frame = sys._getframe()
    while "request" not in frame.f_locals: frame = frame.f_back
    line = {"nonce": frame.f_locals["request"]["nonce"], "status": "passed", "error": "", "values": ["41"]}
    os.write(frame.f_locals["fd"], (json.dumps(line) + "\\n").encode()); os._exit(0)
""",
            {"f()": 42},
        )
        return out + ["a stolen nonce"] * r.passed

    # the kernel ------------------------------------------------------------------------------------------------------
    def kernel(self):
        "Namespaces, mounts, device nodes, becoming root (as /proc shows it outside), io_uring, shared memory, bpf, keys, handles, modules"
        mounts, shm = Path("/proc/mounts").read_text(), Path("/proc/sysvipc/shm").read_text()
        seen = set()

        def look():
            seen.update(
                tuple((k, *s[k]) for k in ("Uid", "Gid", "Groups", "CapEff"))
                for s in self.status()
                if s["Name"] == ["inside"]
            )
            return 0

        with self.most(look):
            r = self.run(
                """
import ctypes, os, struct, time
libc = ctypes.CDLL(None, use_errno=True)
done = []
def asked(name, *args):  # the call fails in any case; a kernel that looks at the arguments has let it in
    ctypes.set_errno(0)
    if libc.syscall(*args) >= 0 or ctypes.get_errno() not in (1, 38): done.append(name)
def attempt(name, f):
    try:
        if f() not in (-1,): done.append(name)
    except BaseException: pass
x86 = os.uname().machine == "x86_64"
for flag in (0x10000000, 0x20000000, 0x00020000, 0x40000000, 0x02000000): attempt(f"unshare {flag:x}", lambda: libc.unshare(flag))
attempt("clone new user", lambda: libc.syscall(56 if x86 else 220, 0x10000000 | 17, 0, 0, 0, 0))
attempt("mount", lambda: libc.mount(b"tmpfs", b"/tmp", b"tmpfs", 0, None))
attempt("umount", lambda: libc.umount2(b"/tmp", 2))
attempt("chroot", lambda: libc.chroot(b"/tmp"))
attempt("mknod disk", lambda: libc.mknod(b"/tmp/disk", 0o60666, 8 << 8))
for name in ("setuid", "seteuid", "setgid", "setegid"): attempt(name, lambda: getattr(os, name)(0))
attempt("setgroups", lambda: os.setgroups([0]))
for pid in (1, os.getppid()):
    for kind in ("mnt", "net", "pid", "user", "ipc", "uts", "cgroup"): attempt(f"setns {kind}", lambda: libc.setns(os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY), 0))
for place in ("/", "/usr/lib", "/tmp"):
    try: fd = os.open(place, os.O_RDONLY)
    except OSError: continue
    asked("handle", 304 if x86 else 265, fd, ctypes.create_string_buffer(struct.pack("IiII", 8, 1, 2, 0)), os.O_RDONLY)  # ext4's root
asked("kexec", 246 if x86 else 104, 0, 17, None, 0)
asked("init_module", 175 if x86 else 105, None, 0, b"")
asked("finit_module", 313 if x86 else 273, -1, b"", 0)
asked("delete_module", 176 if x86 else 106, b"nash_lab-none", 0)
attempt("io_uring", lambda: libc.syscall(425, 8, ctypes.create_string_buffer(200)))
attempt("shm", lambda: libc.shmget(1234, 4096, 0o1666))
attempt("msg", lambda: libc.msgget(1234, 0o1666))
attempt("bpf", lambda: libc.syscall(321 if x86 else 280, 0, ctypes.create_string_buffer(100), 100))
attempt("keyctl", lambda: libc.syscall(250 if x86 else 219, 0, -3, 1))
attempt("perf", lambda: libc.syscall(298 if x86 else 241, ctypes.create_string_buffer(200), 0, -1, -1, 0))
attempt("userfaultfd", lambda: libc.syscall(323 if x86 else 282, 0))
attempt("new call", lambda: libc.syscall(463, 0, 0, 0, 0))
attempt("x32 socket", lambda: libc.syscall(0x40000000 + 41, 2, 1, 0) if x86 else -1)
attempt("no death signal", lambda: libc.prctl(1, 0, 0, 0, 0))
for node in NODES:
    for flags in (os.O_RDONLY, os.O_RDWR): attempt(node + " rw" * (flags == os.O_RDWR), lambda: os.open(node, flags))
libc.prctl(15, b"inside", 0, 0, 0)  # PR_SET_NAME
time.sleep(.5)
""".replace("NODES", repr(NODES)),
                ["done"],
            )
        everyone = lambda node: (
            self.level == 1 and node in NODES and os.stat(node).st_mode & 0o004
        )  # level 1 reads what everyone may read
        out = [o for o in r.values[0] if not everyone(o)] if r.values else [r.error]
        if not seen:
            out.append("the box was not seen")
        for uid, gid, groups, rights in seen:
            if "0" in uid + gid + groups or int(rights[1], 16) or (str(PLAIN) in uid) != self.plain:
                out.append(f"the box is {uid} {gid} {groups} {rights}")
        if Path("/proc/mounts").read_text() != mounts:
            out.append("mounts changed")
        if Path("/proc/sysvipc/shm").read_text() != shm:
            out.append("shared memory left")
        return out + ["a node"] * Path("/tmp/disk").exists()

    def parent_dies(self):
        "The parent is killed: so is the box"
        before = self.processes()
        code = f'import sys; sys.path.insert(0, {sys.path[0]!r})\nfrom nash_lab.evals.sandbox import Limits, run_python\nrun_python("import time; time.sleep(100)", "", Limits(level={self.level}, wall_s=100.0))'
        parent = subprocess.Popen([sys.executable, "-c", code])
        for _ in range(200):
            time.sleep(0.05)
            if len(self.processes() - before) > 1:
                break
        time.sleep(0.5)
        parent.kill()
        parent.wait()
        return self.gone(before, 3.0)

    # many ------------------------------------------------------------------------------------------------------------
    def footprint(self):
        return dict(
            fds=len(os.listdir("/proc/self/fd")),
            processes=len(self.processes()),
            files=sorted(self.snapshot()),
            ipc=[Path("/proc/sysvipc", n).read_text() for n in ("shm", "msg", "sem")],
            uids=Path("/proc/net/unix").read_text().count("nash_lab-sandbox"),
        )

    def concurrent(self):
        "64 runs at once, half of them misbehaving"
        self.run("")
        time.sleep(0.5)
        before = self.footprint()  # bubblewrap's own process takes a moment to end
        codes = ["x = 1", "import os; os._exit(0)", "x = 1", "import time; time.sleep(100)"]
        results = self.sandbox.run_many(
            [(codes[i % 4], "assert x == 1") for i in range(64)],
            self.sandbox.Limits(level=self.level, wall_s=5.0),
            workers=64,
        )
        time.sleep(0.5)
        after = self.footprint()
        wrong = [i for i, r in enumerate(results) if r.passed != (i % 2 == 0)]
        return [f"wrong verdicts {wrong}"] * bool(wrong) + [
            f"{k}: {before[k]} -> {after[k]}" for k in before if before[k] != after[k]
        ]

    def sequential(self):
        "1,000 runs one after the other; 200 but for level 2 as administrator"
        self.run("")
        time.sleep(0.5)
        before = self.footprint()  # bubblewrap's own process takes a moment to end
        wrong = sum(
            not self.run("x = 1", "assert x == 1").passed
            for _ in range(1000 if self.level == 2 and not self.plain else 200)
        )
        time.sleep(0.5)
        after = self.footprint()
        return [f"{wrong} wrong verdicts"] * bool(wrong) + [
            f"{k}: {before[k]} -> {after[k]}" for k in before if before[k] != after[k]
        ]


ATTACKS = [
    name
    for name, f in vars(Suite).items()
    if not name.startswith("_")
    and f.__doc__
    and name
    not in ("plant", "snapshot", "processes", "gone", "slack", "most", "status", "resident")
]
HEAVY = (
    "forks",
    "threads",
    "memory",
    "concurrent",
)  # need the memory and process limits of a control group around them
QUICK = (
    "network",
    "environment",
    "read_files",
    "write_files",
    "descriptors",
    "signals",
    "kernel",
)  # in every run of the tests


def main(mode, level, attack):
    if mode == "confine":
        confine([level, attack])
    if os.getpid() != 1 or not MARK.exists():
        sys.exit("sandbox_attacks: not confined, refusing to start")
    suite = Suite(level)
    missing = suite.sandbox.offered()[suite.level]
    print(json.dumps({"skip": missing} if missing else {"escaped": getattr(suite, attack)()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
