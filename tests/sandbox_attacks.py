"""The escape suite: attacks on `nash_lab.evals.sandbox`, judged from outside the box but inside a confinement of its own.

    python tests/sandbox_attacks.py LEVEL ATTACK     (started by tests/test_sandbox.py, refuses to start anywhere else)

An attack that succeeds reaches what is around the box, so that has to be disposable: new PID, IPC, mount and network namespaces, a memory and
a process limit, empty /tmp, /var/tmp and /dev/shm. Each function returns the list of what got out; an empty list is a pass."""
import json, os, resource, signal, socket, subprocess, sys, threading, time
from pathlib import Path

HERE = Path(__file__).resolve().parent
MARK = Path('/tmp/.nash_lab-confined')
PLAIN = 65_533   # a user without rights, for the level of people who are not the administrator


def mount(*args): subprocess.run(['mount', *map(str, args)], check=True)


def confine(argv):
    "Runs in the new namespaces, before the suite: private places to write, a loopback device, as a plain user if asked"
    import fcntl, struct
    plain, real = argv[0].endswith('u'), os.path.realpath(getattr(sys, '_base_executable', sys.executable))
    private = lambda place: mount('-t', 'tmpfs', '-o', 'size=256m,mode=1777', 'tmpfs', place)
    private('/dev/shm')   # becomes /tmp, with the package in it, which may have been below /tmp itself
    for source, name in ((sys.base_prefix, '.python'), (HERE.parent/'nash_lab', '.lib/nash_lab'), (HERE, '.lib/tests')):
        os.makedirs(f'/dev/shm/{name}'); mount('--bind', source, f'/dev/shm/{name}')
    mount('--rbind', '/dev/shm', '/tmp')
    for place in ('/dev/shm', '/var/tmp'): private(place)
    with socket.socket() as s: fcntl.ioctl(s, 0x8914, struct.pack('16sH14x', b'lo', 0x41))   # SIOCSIFFLAGS: up, running
    MARK.touch()
    python = '/tmp/.python/' + os.path.relpath(real, sys.base_prefix) if plain or real.startswith('/tmp/') else real
    os.environ.update(PYTHONPATH='/tmp/.lib', PLANTED='secret-environment', CHECKOUT=str(HERE.parent), HOME='/tmp')
    os.chdir('/')
    if plain: os.setgroups([]); os.setresgid(PLAIN, PLAIN, PLAIN); os.setresuid(PLAIN, PLAIN, PLAIN)
    os.execv(python, [python, '-B', '/tmp/.lib/tests/sandbox_attacks.py', 'run', *argv])


class Suite:
    def __init__(self, level):
        from nash_lab.evals import sandbox
        self.sandbox, self.level, self.plain = sandbox, int(level[0]), level.endswith('u')
        self.home = Path('/tmp/home'); self.home.mkdir(mode=0o755)

    def run(self, code, tests='', **limits):
        return self.sandbox.run_python(code, tests, self.sandbox.Limits(level=self.level, **{'wall_s': 10.0} | limits))

    def plant(self):
        "Files worth reading and changing: {path: secret}"
        tree = {self.home/'private': 0o600, self.home/'public': 0o644, self.home/'shared': 0o666, self.home/'deep/er/file': 0o644}
        for path, mode in tree.items():
            path.parent.mkdir(parents=True, exist_ok=True); path.write_text(f'secret-{path.name}'); path.chmod(mode)
        for folder in (self.home, self.home/'deep', self.home/'deep/er'): folder.chmod(0o777)
        return {str(p): p.read_text() for p in tree}

    def snapshot(self):
        "All files in the places anybody may write to"
        found = {}
        for place in ('/tmp', '/var/tmp', '/dev/shm', '/dev/mqueue'):
            for path in Path(place).rglob('*'):
                if str(path).startswith(('/tmp/.python', '/tmp/.lib')): continue
                s = path.lstat()
                found[str(path)] = (s.st_mode, s.st_uid, s.st_nlink, s.st_mtime_ns, path.read_bytes() if path.is_file() and not path.is_symlink() else None)
        return found

    def processes(self):
        "Those alive, but for this one. The dead do not count: this is process 1, and bubblewrap leaves the burying to process 1"
        found = set()
        for p in filter(str.isdigit, os.listdir('/proc')):
            try: state = Path('/proc', p, 'stat').read_text().rsplit(')', 1)[1].split()
            except OSError: continue
            if int(p) != os.getpid() and state[0] != 'Z': found.add(p)
        return found

    def gone(self, before, seconds=1.0):
        "Processes that are still here after a while"
        for _ in range(int(seconds * 20)):
            if not (left := self.processes() - before): return []
            time.sleep(.05)
        return [f'process left: {Path("/proc", p, "cmdline").read_bytes()[:60]}' for p in left if Path('/proc', p).exists()]

    # network ---------------------------------------------------------------------------------------------------------
    def network(self):
        "TCP, UDP, a raw system call, abstract and path Unix sockets, a name to resolve: the listeners see nothing"
        AF_UNIX, names = socket.AF_UNIX, {}
        for name, family, kind, where in (('tcp', 2, 1, ('127.0.0.1', 0)), ('udp', 2, 2, ('127.0.0.1', 0)), ('abstract', AF_UNIX, 1, '\0nash_lab-listener'), ('path', AF_UNIX, 1, '/tmp/listener')):
            s = socket.socket(family, kind); s.bind(where); s.setblocking(False)
            if kind == 1: s.listen()
            names[name] = s
        os.chmod('/tmp/listener', 0o777)
        tcp, udp = (names[n].getsockname()[1] for n in ('tcp', 'udp'))
        self.run(f'''
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
def dns(): socket.getaddrinfo("example.org", 80)
def metadata(): socket.create_connection(("169.254.169.254", 80), 1)
for f in (tcp, udp, abstract, path, raw, pair, dns, metadata): attempt(f)
''')
        seen = []
        for name, s in names.items():
            try: s.recv(10) if name == 'udp' else s.accept(); seen.append(name)
            except BlockingIOError: pass
        return seen

    # reading ---------------------------------------------------------------------------------------------------------
    def environment(self):
        "The parent's environment, memory, folder and root, and those of process 1; attaching to it"
        (self.home/'here').write_text('secret-here'); (self.home/'here').chmod(0o600); os.chdir(self.home)
        keep = 'secret-' + 'memory'   # noqa: F841 - in the memory of this process
        r = self.run(f'''
import ctypes, os
print(dict(os.environ))
for pid in (os.getppid(), {os.getpid()}, 1, "self"):
    for name in ("environ", "maps", "mem", "cmdline", "cwd/here", "root{self.home}/here"):
        try: print(open(f"/proc/{{pid}}/{{name}}", "rb").read()[:100_000] if name != "mem" else b"")
        except BaseException as e: print(type(e).__name__)
    for name in ("cwd", "root", "fd"):
        try: print(os.listdir(f"/proc/{{pid}}/{{name}}"))
        except BaseException as e: print(type(e).__name__)
    try: print("traced", ctypes.CDLL(None).ptrace(16, int(pid), 0, 0) == 0)
    except ValueError: pass
''')
        got = r.stdout + r.stderr
        return [word for word in ('secret-environment', 'secret-here', 'secret-memory', 'traced True') if word in got]

    def read_files(self):
        "Secrets of mode 600 and 644, root's home, the users' passwords, the checkout"
        planted = self.plant() | {'/etc/shadow': Path('/etc/shadow').read_text()[:200] if os.access('/etc/shadow', os.R_OK) else 'root:$'}
        page = next(str(p) for p in (Path(os.environ['CHECKOUT'])/'settings.ini', HERE/'sandbox_attacks.py') if os.access(p, os.R_OK))
        planted[page] = Path(page).read_text()[:200]
        r = self.run(f'''
import os
for path in {list(planted)!r}:
    for way in (path, "/proc/self/root" + path, "/proc/self/cwd" + path, "/tmp/../" + path):
        try: print(open(way).read(2000))
        except OSError as e: print(e.strerror)
for folder in ("/root", {str(self.home)!r}, {str(HERE.parent)!r}):
    try: print(os.listdir(folder))
    except OSError as e: print(e.strerror)
for fd in range(3, 64):
    for path in {list(planted)!r}:
        try: print(open(os.open("../" * 12 + path, os.O_RDONLY, dir_fd=fd)).read(2000))
        except OSError: pass
''')
        readable = [] if self.level > 1 else [k for k in planted if os.stat(k).st_mode & 0o004]   # level 1: what everyone may read
        return [path for path, secret in planted.items() if secret[:60] in r.stdout and path not in readable]

    def descriptors(self):
        "Descriptors that this process has open, even those marked for children"
        (self.home/'open').write_text('secret-open')
        fds = [os.open(self.home/'open', os.O_RDONLY) for _ in range(30)]
        for fd in fds: os.set_inheritable(fd, True)
        r = self.run('import os\nfor fd in range(300):\n try: print(os.pread(fd, 100, 0))\n except OSError: pass\n'
                     'for fd in range(300):\n try: print(os.read(os.open(f"/proc/self/fd/{fd}", os.O_NONBLOCK), 100))\n except OSError: pass')
        return ['secret-open'] if 'secret-open' in r.stdout else []

    # changing --------------------------------------------------------------------------------------------------------
    def write_files(self):
        "Overwrite, append, truncate, delete, rename, link, chmod, new files in every place that is open to all"
        self.plant(); before = self.snapshot()
        packages = [p for p in sys.path if p.endswith('site-packages')] or ['/usr/lib/python3/dist-packages']
        self.run(f'''
import ctypes, os, shutil, tempfile
home = {str(self.home)!r}
def each(*calls):
    for call in calls:
        try: call()
        except BaseException: pass
for path in (home + "/shared", home + "/public", "/proc/self/root" + home + "/shared", "/tmp/../tmp/home/shared"):
    each(lambda: open(path, "w").write("x"), lambda: open(path, "a").write("x"), lambda: open(path, "r+").write("x"), lambda: os.truncate(path, 0),
         lambda: os.chmod(path, 0), lambda: os.utime(path, (0, 0)), lambda: os.setxattr(path, "user.a", b"1"),
         lambda: os.rename(path, path + "2"), lambda: os.link(path, "/tmp/hard"), lambda: os.unlink(path), lambda: os.symlink(path, "/tmp/soft"))
each(lambda: shutil.rmtree(home), lambda: os.rmdir(home + "/deep/er"), tempfile.mkdtemp, tempfile.NamedTemporaryFile, lambda: tempfile.TemporaryFile(dir="/tmp"))
for place in ("/tmp", "/var/tmp", "/dev/shm", home, ".", *{packages!r}):
    each(lambda: open(place + "/new", "w"), lambda: os.mkdir(place + "/folder"), lambda: os.mkfifo(place + "/fifo"), lambda: os.mknod(place + "/node"),
         lambda: open(place + "/evil.pth", "w"), lambda: os.mkdir(place + "/__pycache__"))
libc = ctypes.CDLL(None)
for name in (b"/tmp/c1", b"/dev/shm/c2"): each(lambda: libc.creat(name, 0o666), lambda: libc.open(name, 0o1101, 0o666), lambda: libc.shm_open(b"/c3", 0o102, 0o666))
each(lambda: __import__("multiprocessing").Lock(), lambda: os.open("/tmp", 0o20200002))
''')
        after = self.snapshot()
        new = [str(Path(p, n)) for p in packages for n in ('new', 'evil.pth', 'folder') if Path(p, n).exists()]
        return [k for k in before.keys() | after.keys() if before.get(k) != after.get(k)] + new

    def fill_disk(self):
        "A file of 1 GB, 10,000 small ones, a deep tree"
        before = self.snapshot()
        self.run('''
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
''')
        return [k for k in self.snapshot().keys() ^ before.keys()]

    def result_place(self):
        "The pipe for the verdict closed, replaced by something else, held open"
        got = []
        for name, code in {'closed': 'os.closerange(3, 300)', 'replaced': 'r, w = os.pipe()\nfor fd in range(3, 60):\n try: os.dup2(w, fd)\n except OSError: pass',
                           'stdout': 'os.dup2(1, 3); os.closerange(4, 300)', 'held': 'for fd in range(3, 30):\n try: os.dup(fd)\n except OSError: pass\nos._exit(0)'}.items():
            start = time.monotonic()
            if self.run('import os\n' + code, 'assert True', wall_s=3.0).passed: got.append(f'{name} passed')
            if time.monotonic() - start > 10: got.append(f'{name} hung')
        return got

    # processes -------------------------------------------------------------------------------------------------------
    def signals(self):
        "Signals to the parent, its group, everyone (with signal 0); stopping and renicing: a canary and this process feel nothing"
        felt = []
        for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT): signal.signal(s, lambda n, _: felt.append(f'signal {n}'))
        canary = subprocess.Popen(['sleep', '60'])
        state = lambda: (Path(f'/proc/{canary.pid}/stat').read_text().split()[2] in 'TtZX', os.getpriority(os.PRIO_PROCESS, canary.pid), os.sched_getaffinity(canary.pid), resource.prlimit(canary.pid, resource.RLIMIT_NOFILE))
        before = state()
        r = self.run(f'''
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
''', ['reached'])
        time.sleep(.1)
        if canary.poll() is not None or state() != before: felt.append(f'canary {canary.poll()}')
        canary.kill(); canary.wait()
        inside = r.values[0] if r.values else [r.error]
        return felt + inside

    def forks(self):
        "A fork bomb (400 at most), forks by the C library and by number, a daemon, a child that holds the output"
        before, most, stop = self.processes(), [0], threading.Event()
        def watch():
            while not stop.wait(.02): most[0] = max(most[0], len(self.processes() - before))
        watcher = threading.Thread(target=watch); watcher.start()
        start = time.monotonic()
        for code in ('for _ in range(400):\n try:\n  if os.fork() == 0: time.sleep(30); os._exit(0)\n except OSError: pass',
                     'libc = ctypes.CDLL(None)\nfor _ in range(50):\n if libc.fork() == 0: time.sleep(30); os._exit(0)',
                     'libc = ctypes.CDLL(None)\nfor n in (56, 57, 58):\n for _ in range(5):\n  if libc.syscall(n, 17, 0, 0, 0, 0) == 0: time.sleep(30); os._exit(0)',
                     'if os.fork() == 0:\n os.setsid()\n if os.fork() == 0: time.sleep(30)\n os._exit(0)',
                     'import subprocess; subprocess.Popen(["sleep", "30"])', 'os.posix_spawn("/bin/sleep", ["sleep", "30"], {})', 'os.system("sleep 30 &")'):
            self.run('import ctypes, os, time\n' + code, wall_s=3.0)
        took = time.monotonic() - start
        stop.set(); watcher.join()
        return self.gone(before) + [f'{most[0]} processes at once'] * (most[0] > 6) + [f'took {took:.0f} s'] * (took > 40)

    def threads(self):
        "A thread bomb, with stacks as small as they get"
        before = self.processes()
        r = self.run('''
import threading, time
threading.stack_size(32768)
count = 0
try:
    for _ in range(3000): threading.Thread(target=time.sleep, args=(2,), daemon=True).start(); count += 1
except BaseException: pass
''', ['count'])
        most = 0 if self.plain else 16
        return self.gone(before) + ([] if r.values and r.values[0] <= most else [f'{r.values or r.error} threads'])

    def memory(self):
        "6 GB at once, children with 150 MB each, a huge power, a zip bomb, deep recursion: this process does not grow, the box stays small"
        out, before = [], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for code in ('x = bytearray(6 << 30)', 'x = [bytes(1 << 20) for _ in range(6000)]', 'import os\nfor _ in range(12):\n if os.fork() == 0: x = b"1" * (150 << 20); import time; time.sleep(5)',
                     'x = 10 ** 10 ** 8', 'import zlib\nb = zlib.compressobj(9); d = b"".join(b.compress(bytes(1 << 20)) for _ in range(900)) + b.flush(); x = zlib.decompress(d)',
                     'import sys; sys.setrecursionlimit(10 ** 9)\ndef f(): return f()\nf()', 'x = "a" * (1 << 40)',
                     'import mmap\nx = [mmap.mmap(-1, 1 << 30) for _ in range(8)]', 'import os\nx = [os.memfd_create("a") for _ in range(9)]\nfor fd in x: os.write(fd, bytes(400 << 20))'):
            r = self.run(code, 'assert not x', wall_s=4.0, cpu_s=4)
            if r.passed: out.append(f'{code[:30]} passed')
        children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        return out + [f'a box of {children >> 10} MB'] * (children >> 10 > 560) + [f'this process grew by {grown >> 10} MB'] * (grown >> 10 > 50)

    # time and output -------------------------------------------------------------------------------------------------
    def clock(self):
        "Loops, ignored signals, a regular expression in C, exit handlers, `__del__`, a thread that is waited for: over at the limit"
        out, before = [], self.processes()
        idle = max(self.run('').wall_s for _ in range(3))
        for code in ('while True: pass', 'import signal\nfor s in range(1, 65):\n try: signal.signal(s, signal.SIG_IGN)\n except (OSError, ValueError): pass\nwhile True: pass',
                     'import re; re.match("(a+)+b", "a" * 60)', 'import time; time.sleep(100)', 'import signal; signal.pause()', 'import os; r, w = os.pipe(); os.read(r, 1)',
                     'import atexit, time; atexit.register(time.sleep, 100)', 'class A:\n def __del__(self):\n  while True: pass\na = A()',
                     'import threading, time; threading.Thread(target=time.sleep, args=(100,)).start()', 'import sys; sys.settrace(lambda *a: 1 / 0)'):
            r = self.run(code, wall_s=1.0)
            if r.wall_s > 2.0 + 3 * idle: out.append(f'{code[:40]} took {r.wall_s:.1f} s')
        return out + self.gone(before)

    def processor(self):
        "The limit on processor time, with the signal ignored"
        r = self.run('import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass', wall_s=30.0, cpu_s=1)
        return [] if not r.passed and r.status in ('timeout', 'crashed') and r.wall_s < 25 else [str(r)]

    def output(self):
        "500 MB of output, as much to stderr, bytes that are no text: cut, flagged, no exception, no growth here"
        out, before = [], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for stream in (1, 2):
            r = self.run(f'import os\nfor _ in range(500): os.write({stream}, b"x" * (1 << 20))', output_bytes=100_000)
            if not r.truncated or len(r.stdout) + len(r.stderr) != 100_000: out.append(f'stream {stream}: {len(r.stdout)} {len(r.stderr)} {r.truncated}')
        for data in (b'\0\1\2\xff\xfe', b'\x1b[2J\x1b]0;x\7', '\u20ac'.encode()[:2], b'\xed\xa0\x80'):
            r = self.run(f'import os; os.write(1, {data!r})')
            if not r.passed or not isinstance(r.stdout, str): out.append(repr(data))
        r = self.run('x = "y" * 5_000_000', ['x'], output_bytes=100_000)
        if r.passed: out.append('a verdict above the limit passed')
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        return out + [f'this process grew by {grown >> 10} MB'] * (grown >> 10 > 50)

    # the verdict -----------------------------------------------------------------------------------------------------
    def exits(self):
        "Leaving in every way, from the code and from what the tests call: never a pass"
        ways = ['sys.exit(0)', 'os._exit(0)', 'raise SystemExit', 'exit(0)', 'os.kill(os.getpid(), 9)', 'os.kill(os.getpid(), 15)', 'os.abort()', 'ctypes.string_at(0)', 'ctypes.CDLL(None)._exit(0)',
                'ctypes.CDLL(None).exit(0)', 'os.execv("/bin/true", ["true"])', 'os.execv("/proc/self/exe", ["python", "-c", ""])', 'raise KeyboardInterrupt', 'raise GeneratorExit', 'sys.stdout.close(); os._exit(0)']
        out = []
        for way in ways:
            for code, tests in ((f'import ctypes, os, sys\n{way}', 'assert False'), (f'import ctypes, os, sys\ndef f():\n {way.replace("; ", chr(10) + " ")}', 'assert f() == 1'),
                                (f'import ctypes, os, sys\nclass A:\n def __init__(self):\n  {way.replace("; ", chr(10) + "  ")}\ndef f(): return A()', {'f()': 1})):
                if self.run(code, tests).passed: out.append(f'{way}: {tests}')
        return out

    def forgeries(self):
        "Printed and written verdicts, wrong nonces, two verdicts, patched helpers, payloads instead of JSON"
        canary = Path('/tmp/canary')
        verdict = '{"nonce": "0", "status": "passed", "error": "", "values": []}'
        write = 'import os\nfor fd in range(1, 64):\n try: os.write(fd, {})\n except OSError: pass\n'
        out, bad = [], {
            'printed': f'print("PASSED"); print({verdict!r})', 'written': write.format(repr((verdict + '\n').encode())) + 'os._exit(0)', 'two': write.format(repr((verdict + '\n').encode())),
            'no newline': write.format(repr(verdict.encode())) + 'os._exit(0)', 'pickle': write.format('__import__("pickle").dumps(E())') + 'os._exit(0)',
            'npy': write.format('b"\\x93NUMPY\\x01\\0v\\0" + b"x" * 200') + 'os._exit(0)', 'nan': write.format('b\'{"nonce": NaN}\\n\'') + 'os._exit(0)', 'infinite': write.format('b\'{"nonce": 1e999}\\n\'') + 'os._exit(0)',
            'nested': write.format('b"[" * 100_000 + b"\\n"') + 'os._exit(0)', 'builtins': 'import builtins\nbuiltins.all = builtins.abs = builtins.isinstance = lambda *a: True\nbuiltins.AssertionError = None',
            'math': 'import math; math.isclose = lambda *a, **k: True', 'own names': 'def all(x): return True\nabs = lambda x: 0', 'builtins name': '__builtins__ = {"all": lambda x: True, "__import__": __import__}',
            'trace': 'import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)', 'json': 'import json; json.dumps = lambda *a, **k: "{}"', 'main': 'import __main__; __main__.judge = lambda **k: dict(status="passed", error="", values=[]); __main__.describe = str'}
        for name, code in bad.items():
            head = f'class E:\n def __reduce__(self): return (open, ({str(canary)!r}, "w"))\n'
            if self.run(head + code, 'import math\nassert all([0]) and math.isclose(1, 2) and abs(-1) == 0').passed: out.append(name)
        return out + ['the payload ran'] * canary.exists()

    def values(self):
        "Values that are not plain data, or try to be more: refused, or no pass"
        out = []
        for value in ('float("nan")', '1e999', '{1: float("inf")}', 'type("A", (), {"__eq__": lambda *a: True})()', 'type("A", (int,), {"__eq__": lambda *a: True, "__hash__": int.__hash__})(3)', 'b"42"', 'b', '42 + 1', '"42"',
                      'type("A", (), {"tolist": lambda s: 43})()', 'True', '[[]] * 10', '(lambda f: f(f, 100_000))(lambda f, n: [n])'):
            if self.run(f'import sys\nb = []\nfor _ in range(100_000): b = [b]\ndef f(): return {value}', {'f()': 42}).passed: out.append(value)
        r = self.run('''
import sys, json, os
def f():
    frame = sys._getframe()
    while "request" not in frame.f_locals: frame = frame.f_back
    line = {"nonce": frame.f_locals["request"]["nonce"], "status": "passed", "error": "", "values": ["41"]}
    os.write(frame.f_locals["fd"], (json.dumps(line) + "\\n").encode()); os._exit(0)
''', {'f()': 42})
        return out + ['a stolen nonce'] * r.passed

    # the kernel ------------------------------------------------------------------------------------------------------
    def kernel(self):
        "Namespaces, mounts, device nodes, becoming root, io_uring, shared memory, bpf, keys, modules"
        mounts, shm = Path('/proc/mounts').read_text(), Path('/proc/sysvipc/shm').read_text()
        r = self.run('''
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
done = []
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
for name in ("setuid", "seteuid", "setgid"): attempt(name, lambda: os.getuid() and getattr(os, name)(0) is None or -1)
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
for node in ("/dev/sda", "/dev/vda", "/dev/mem", "/dev/kmsg", "/dev/kvm", "/dev/nvidia0", "/dev/tty", "/dev/fuse", "/dev/net/tun"):
    for flags in (os.O_RDONLY, os.O_RDWR): attempt(node, lambda: os.open(node, flags))
''', ['done'])
        everyone = lambda node: self.level == 1 and node.startswith('/dev/') and os.stat(node).st_mode & 0o004   # level 1 reads what everyone may read
        out = [o for o in r.values[0] if not everyone(o)] if r.values else [r.error]
        if Path('/proc/mounts').read_text() != mounts: out.append('mounts changed')
        if Path('/proc/sysvipc/shm').read_text() != shm: out.append('shared memory left')
        return out + ['a node'] * Path('/tmp/disk').exists()

    def parent_dies(self):
        "The parent is killed: so is the box"
        before = self.processes()
        code = f'import sys; sys.path.insert(0, {sys.path[0]!r})\nfrom nash_lab.evals.sandbox import Limits, run_python\nrun_python("import time; time.sleep(100)", "", Limits(level={self.level}, wall_s=100.0))'
        parent = subprocess.Popen([sys.executable, '-c', code])
        for _ in range(200):
            time.sleep(.05)
            if len(self.processes() - before) > 1: break
        time.sleep(.5)
        parent.kill(); parent.wait()
        return self.gone(before, 3.0)

    # many ------------------------------------------------------------------------------------------------------------
    def footprint(self):
        return dict(fds=len(os.listdir('/proc/self/fd')), processes=len(self.processes()), files=sorted(self.snapshot()),
                    ipc=[Path('/proc/sysvipc', n).read_text() for n in ('shm', 'msg', 'sem')], uids=Path('/proc/net/unix').read_text().count('nash_lab-sandbox'))

    def concurrent(self):
        "64 runs at once, half of them misbehaving"
        self.run(''); time.sleep(.5); before = self.footprint()   # bubblewrap's own process takes a moment to end
        codes = ['x = 1', 'import os; os._exit(0)', 'x = 1', 'import time; time.sleep(100)']
        results = self.sandbox.run_many([(codes[i % 4], 'assert x == 1') for i in range(64)], self.sandbox.Limits(level=self.level, wall_s=5.0), workers=64)
        time.sleep(.5)
        after = self.footprint()
        wrong = [i for i, r in enumerate(results) if r.passed != (i % 2 == 0)]
        return [f'wrong verdicts {wrong}'] * bool(wrong) + [f'{k}: {before[k]} -> {after[k]}' for k in before if before[k] != after[k]]

    def sequential(self):
        "1,000 runs one after the other (200 in bubblewrap, which takes longer to start)"
        self.run(''); time.sleep(.5); before = self.footprint()   # bubblewrap's own process takes a moment to end
        wrong = sum(not self.run('x = 1', 'assert x == 1').passed for _ in range(200 if self.level == 3 else 1000))
        time.sleep(.5)
        after = self.footprint()
        return [f'{wrong} wrong verdicts'] * bool(wrong) + [f'{k}: {before[k]} -> {after[k]}' for k in before if before[k] != after[k]]


ATTACKS = [name for name, f in vars(Suite).items() if not name.startswith('_') and f.__doc__ and name not in ('plant', 'snapshot', 'processes', 'gone')]
HEAVY = ('forks', 'threads', 'memory', 'concurrent')   # need the memory and process limits of a control group around them
QUICK = ('network', 'environment', 'read_files', 'write_files', 'descriptors', 'signals', 'kernel')   # in every run of the tests


def main(mode, level, attack):
    if mode == 'confine': confine([level, attack])
    if os.getpid() != 1 or not MARK.exists(): sys.exit('sandbox_attacks: not confined, refusing to start')
    suite = Suite(level)
    missing = suite.sandbox.offered()[suite.level]
    print(json.dumps({'skip': missing} if missing else {'escaped': getattr(suite, attack)()}))


if __name__ == '__main__': main(*sys.argv[1:])
