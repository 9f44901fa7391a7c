"""Three servers with agents, two proxies, three nodes of control and etcd, each on a host of its own, while hosts, processes and
the network between them fail at random, and clients write.

Hosts are network namespaces on one bridge, and speak TLS to each other. Clients know of each row whether it was acknowledged,
refused, or neither; afterwards every acknowledged row has to be there, no refused one, and none twice. A session that stays has
to keep its settings. Once everything is mended, all has to be in order again by itself.

A fault is a line on standard output, with the second in which it began; the same seed gives the same faults.

Usage: torture.py HOLDFAST DIR [SECONDS [SEED]]; `cargo xtask torture` calls it, as root.
"""

import ctypes
import json
import os
import pathlib
import pwd
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import psycopg

BIN = next(path for path in sorted(pathlib.Path("/usr/lib/postgresql").glob("*/bin"), reverse=True) if (path / "initdb").exists())
CELLS = ("a", "b", "c")
PROXIES = ("p1", "p2")
NODES = ("k1", "k2", "k3")
HOSTS = {name: f"10.77.0.{at}" for at, name in enumerate((*CELLS, *PROXIES, *NODES, "e"), start=1)}
CLIENT = "10.77.0.100"
HUB = "hf-hub"
WRITERS = 4
MENDED_S = 120.0
# Without a commit for longer is told.
GAP_S = 4.0
# Nobody has this address.
NOBODY = "02:00:00:00:00:99"


def sh(*args, check=True):
    done = subprocess.run(args, capture_output=True, text=True)
    if check and done.returncode != 0:
        raise RuntimeError(f"{' '.join(args)}: {done.stderr.strip()}")
    return done.stdout


def namespace(host):
    return f"hf-{host}"


def on(host, *args):
    """The command that runs this on a host."""
    return ["nsenter", f"--net=/run/netns/{namespace(host)}", *args]


def make_network():
    remove_network()
    sh("ip", "netns", "add", HUB)
    sh("ip", "-n", HUB, "link", "set", "lo", "up")
    sh("ip", "-n", HUB, "link", "add", "br0", "type", "bridge")
    sh("ip", "-n", HUB, "addr", "add", f"{CLIENT}/24", "dev", "br0")
    sh("ip", "-n", HUB, "link", "set", "br0", "up")
    for host, address in HOSTS.items():
        its = namespace(host)
        sh("ip", "netns", "add", its)
        sh("ip", "-n", its, "link", "set", "lo", "up")
        sh("ip", "-n", its, "link", "add", "eth0", "type", "veth", "peer", "name", f"v-{host}")
        sh("ip", "-n", its, "link", "set", f"v-{host}", "netns", HUB)
        sh("ip", "-n", its, "addr", "add", f"{address}/24", "dev", "eth0")
        sh("ip", "-n", its, "link", "set", "eth0", "up")
        sh("ip", "-n", HUB, "link", "set", f"v-{host}", "master", "br0")
        sh("ip", "-n", HUB, "link", "set", f"v-{host}", "up")


def remove_network():
    for name in (HUB, *map(namespace, HOSTS)):
        sh("ip", "netns", "del", name, check=False)


def in_hub():
    """This process is where clients are, from here on."""
    clone_newnet = 0x40000000
    with open(f"/run/netns/{HUB}") as place:
        if ctypes.CDLL(None, use_errno=True).setns(place.fileno(), clone_newnet) != 0:
            raise OSError(ctypes.get_errno(), "setns")


def unprivileged():
    user = pwd.getpwnam("postgres")
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def tree(pid):
    """A process and what it has started, and what those have."""
    pairs = [tuple(map(int, line.split())) for line in sh("ps", "-eo", "pid=,ppid=").splitlines()]
    found = [pid]
    for one in found:
        found += [child for child, parent in pairs if parent == one]
    return found


def send(pids, number):
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def wait(what, is_so, limit=60.0):
    until = time.monotonic() + limit
    while time.monotonic() < until:
        try:
            if is_so():
                return
        except (OSError, psycopg.Error, ValueError, subprocess.SubprocessError, RuntimeError):
            pass
        time.sleep(0.1)
    raise RuntimeError(f"waited {limit:.0f} s for {what}")


class Installation:
    def __init__(self, holdfast, directory, is_shared):
        self.holdfast, self.dir, self.is_shared = holdfast, directory, is_shared
        self.running = {}
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        directory.chmod(0o755)
        self.certificates()
        self.servers()
        self.configurations()
        for host in ("e", *NODES, *CELLS):
            self.start(host)
        wait("control", lambda: self.command("status", "shop"))
        for host in PROXIES:
            self.start(host)
        wait("proxies", lambda: all(self.value(proxy, "SELECT 1") == 1 for proxy in PROXIES))
        self.command("--reason", "torture", "status")
        wait("all in order", self.is_in_order)

    def certificates(self):
        tls = self.dir / "tls"
        tls.mkdir()
        new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
        sh("openssl", "req", "-x509", *new, "-subj", "/CN=torture", "-keyout", f"{tls}/ca.key", "-out", f"{tls}/ca.crt")
        names = {**{cell: f"shop/{cell}" for cell in CELLS}, **{proxy: f"proxy:{proxy}" for proxy in PROXIES}}
        for host, address in HOSTS.items():
            name = names.get(host, host).replace("/", "\\/")
            more = ["-addext", f"subjectAltName=IP:{address}", "-addext", "basicConstraints=CA:FALSE"]
            sign = ["-CA", f"{tls}/ca.crt", "-CAkey", f"{tls}/ca.key"]
            sh("openssl", "req", "-x509", *new, *sign, "-subj", f"/CN={name}", *more,
               "-keyout", f"{tls}/{host}.key", "-out", f"{tls}/{host}.crt")

    def as_server(self, host, program, *args):
        command = on(host, "setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups", f"{BIN}/{program}", *args)
        return sh(*command)

    def servers(self):
        who = unprivileged()
        for cell in CELLS:
            data = self.dir / cell
            data.mkdir(mode=0o700)
            os.chown(data, who["user"], who["group"])
            data = str(data)
            if cell == CELLS[0]:
                self.as_server(cell, "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync", "--data-checksums")
                with open(f"{data}/postgresql.conf", "a") as conf:
                    conf.write(
                        "listen_addresses = '*'\nunix_socket_directories = ''\nwal_log_hints = on\nwal_keep_size = 512MB\n"
                        "wal_retrieve_retry_interval = 100ms\nmax_connections = 200\nshared_buffers = 64MB\n"
                    )
                with open(f"{data}/pg_hba.conf", "a") as hba:
                    hba.write("host all all 10.77.0.0/24 trust\nhost replication all 10.77.0.0/24 trust\n")
            else:
                self.as_server(cell, "pg_basebackup", "-D", data, "-h", HOSTS[CELLS[0]], "-U", "postgres", "-R", "-c", "fast")
            self.as_server(cell, "pg_ctl", "start", "-w", "-D", data, "-l", f"{data}/server.log")

    def tls(self, host):
        return "".join(f'{what} = "{self.dir}/tls/{name}"\n' for what, name in
                       (("cert", f"{host}.crt"), ("key", f"{host}.key"), ("ca", "ca.crt")))

    def configurations(self):
        cells = "".join(
            f'\n[[app.cell]]\nname = "{cell}"\nserver = "{HOSTS[cell]}:5432"\nactive = {str(cell == CELLS[0]).lower()}\nagent = true\n'
            for cell in CELLS
        )
        pool = 'pool = "transaction"\npool_size = 8\n' if self.is_shared else ""
        app = (f'[[app]]\nname = "shop"\nauth = "trust"\nsslmode = "disable"\n{pool}'
               f"\n[app.durability]\nacks = 1\n\n[app.failover]\nautomatic = true\nblock = \"1s\"\n{cells}")
        controls = "[" + ", ".join(f'"{HOSTS[node]}:7433"' for node in NODES) + "]"
        for node in NODES:
            self.write(node, f'[control]\nlisten = "127.0.0.1:7432"\n\n[control.agents]\nlisten = "{HOSTS[node]}:7433"\n{self.tls(node)}\n'
                             f'[control.etcd]\nnode = "{node}"\nendpoints = "http://{HOSTS["e"]}:2379"\n\n{app}')
        for proxy in PROXIES:
            self.write(proxy, f'[proxy]\nlisten = ["{HOSTS[proxy]}:6432"]\n\n[proxy.control]\nname = "{proxy}"\naddress = {controls}\n'
                              f"{self.tls(proxy)}\n{app}")
        for cell in CELLS:
            self.write(cell, f'[agent]\napp = "shop"\ncell = "{cell}"\ncontrol = {controls}\nlisten = "{HOSTS[cell]}:7433"\n{self.tls(cell)}'
                             f'state_dir = "{self.dir}/agent-{cell}"\ndata_dir = "{self.dir}/{cell}"\nbin_dir = "{BIN}"\n'
                             f'server_options = ["-p 5432"]\n')

    def write(self, host, text):
        (self.dir / f"{host}.toml").write_text(text)

    def start(self, host):
        args = [self.holdfast, "run", "-c", f"{self.dir}/{host}.toml"]
        if host == "e":
            peer, client = f"http://{HOSTS['e']}:2380", f"http://{HOSTS['e']}:2379"
            args = ["/usr/bin/etcd", "--data-dir", f"{self.dir}/etcd", "--listen-client-urls", client, "--advertise-client-urls", client,
                    "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"default={peer}"]
        with open(self.dir / f"{host}.log", "ab") as out:
            environment = {**os.environ, "HOLDFAST_LOG": "info"}
            self.running[host] = subprocess.Popen(
                on(host, *args), stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, env=environment
            )

    def is_running(self, host):
        return self.running[host].poll() is None

    def postmaster(self, cell):
        return int((self.dir / cell / "postmaster.pid").read_text().split()[0])

    def server(self, cell):
        try:
            return [pid for pid in tree(self.postmaster(cell)) if self.is_server(pid)]
        except (OSError, ValueError, IndexError):
            return []

    def is_server(self, pid):
        try:
            return b"postgres" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return False

    def guard(self, cell):
        return [int(pid) for pid in sh("pgrep", "-f", f"__guard .* {self.dir}/{cell} ", check=False).split()]

    def everything(self, host):
        own = [self.running[host].pid] if self.is_running(host) else []
        return own + (self.guard(host) + self.server(host) if host in CELLS else [])

    def command(self, *args):
        """Asks each node, on its host, whichever is control."""
        said = ""
        for node in NODES:
            if not self.is_running(node):
                continue
            command = on(node, "timeout", "10", self.holdfast, "--api", "http://127.0.0.1:7432", *args)
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                return done.stdout
            said += done.stderr
        raise RuntimeError(said)

    def seat(self):
        for node in NODES:
            if self.is_running(node):
                command = on(node, "timeout", "3", self.holdfast, "--api", "http://127.0.0.1:7432", "executions")
                if subprocess.run(command, capture_output=True).returncode == 0:
                    return node
        return random.choice(NODES)

    def active(self):
        shop = json.loads(self.command("status", "--json"))["apps"][0]
        return next((cell["name"] for cell in shop["cells"] if cell["state"] == "active"), None)

    def is_in_order(self):
        return "!" not in self.command("status", "shop")

    def dsn(self, proxy):
        return f"host={HOSTS[proxy]} port=6432 user=postgres dbname=postgres connect_timeout=3"

    def value(self, proxy, sql):
        with psycopg.connect(self.dsn(proxy), autocommit=True) as client:
            return client.execute(sql).fetchone()[0]

    def stop(self):
        pids = [pid for host in self.running for pid in self.everything(host)]
        pids += [pid for host in self.running for pid in tree(self.running[host].pid)]
        send(pids, signal.SIGCONT)
        send(pids, signal.SIGKILL)
        for process in self.running.values():
            process.wait()
        remove_network()


class Writer:
    """One client: rows by themselves, and rows in transactions of two statements."""

    def __init__(self, installation, number, proxy):
        self.dsn, self.number, self.proxy = installation.dsn(proxy), number, proxy
        self.acknowledged, self.refused, self.unknown = [], [], []
        self.told, self.connections, self.wrong = {}, 0, []
        self.is_over = False
        # A connection to a host that is cut off may never answer.
        self.thread = threading.Thread(target=self.write, daemon=True)
        self.thread.start()

    def connect(self):
        client = psycopg.connect(
            self.dsn, autocommit=True, prepare_threshold=None, keepalives_idle=1, keepalives_interval=1, keepalives_count=3,
            tcp_user_timeout=4000,
        )
        self.connections += 1
        client.execute(f"SET torture.writer = '{self.number}-{self.connections}'")
        return client

    def write(self):
        client, row = None, self.number
        while not self.is_over:
            time.sleep(0.01)
            row += WRITERS
            is_block = row // WRITERS % 3 == 0
            ends = not is_block
            try:
                client = client or self.connect()
                if row // WRITERS % 10 == 0:
                    found = client.execute("SHOW torture.writer").fetchone()[0]
                    if found != f"{self.number}-{self.connections}":
                        self.wrong.append((row, found))
                if is_block:
                    client.execute("BEGIN")
                    client.execute("INSERT INTO written VALUES (%s)", (row,))
                    client.execute("UPDATE counted SET n = n + 1 WHERE writer = %s", (self.number,))
                    ends = True
                    client.execute("COMMIT")
                else:
                    client.execute("INSERT INTO written VALUES (%s)", (row,))
                self.acknowledged.append((time.monotonic(), row))
            except psycopg.Error as error:
                state = error.sqlstate
                self.told[state] = self.told.get(state, 0) + 1
                # A statement that was answered by an error was not done; what was not answered may have been.
                lives = client is not None and not client.closed
                is_refused = client is None or not ends or (lives and state not in (None, "08007", "08006", "57P01"))
                (self.refused if is_refused else self.unknown).append(row)
                if client is not None and not client.closed:
                    try:
                        client.execute("ROLLBACK")
                    except psycopg.Error:
                        client.close()
                if client is not None and client.closed:
                    client = None

    def stop(self):
        self.is_over = True
        self.thread.join(60.0)
        return not self.thread.is_alive()


class Faults:
    """Breaks something, and says what; gives how it is mended."""

    def __init__(self, installation, seed):
        self.of, self.random = installation, random.Random(seed)

    def next(self):
        kinds = (self.server, self.agent, self.host, self.freeze, self.cut_off, self.one_way, self.one_way, self.control, self.freeze_control,
                 self.proxy, self.freeze_proxy, self.store, self.switchover, self.switchover, self.apart, self.backend, self.guard,
                 self.freeze_server, self.freeze_agent)
        return self.random.choice(kinds)()

    def some_cell(self):
        """Mostly the one that matters."""
        if self.random.random() < 0.6:
            try:
                active = self.of.active()
            except (RuntimeError, ValueError):
                active = None
            if active:
                return active
        return self.random.choice(CELLS)

    def start_again(self, host):
        def mend():
            if not self.of.is_running(host):
                self.of.start(host)
        return mend

    def server(self):
        cell = self.some_cell()
        send(self.of.server(cell)[:1], signal.SIGKILL)
        return f"kill the postmaster of {cell}", 0.0, lambda: None

    def agent(self):
        cell = self.some_cell()
        send([self.of.running[cell].pid], signal.SIGKILL)
        self.of.running[cell].wait()
        return f"kill the agent of {cell}", self.random.uniform(0.1, 6.0), self.start_again(cell)

    def host(self):
        cell = self.some_cell()
        send(self.of.everything(cell), signal.SIGKILL)
        self.of.running[cell].wait()
        return f"kill everything of {cell}", self.random.uniform(0.5, 8.0), self.start_again(cell)

    def backend(self):
        """The server ends all others and recovers."""
        cell = self.some_cell()
        backends = self.of.server(cell)[1:]
        send(self.random.sample(backends, min(1, len(backends))), signal.SIGKILL)
        return f"kill a backend of {cell}", 0.0, lambda: None

    def guard(self):
        cell = self.some_cell()
        send(self.of.guard(cell), signal.SIGKILL)
        return f"kill the guard of {cell}", 0.0, lambda: None

    def freeze_server(self):
        cell = self.some_cell()
        return self.frozen(cell, f"the server of {cell}", self.of.server(cell))

    def freeze_agent(self):
        cell = self.some_cell()
        return self.frozen(cell, f"the agent of {cell}", [self.of.running[cell].pid])

    def frozen(self, host, what, pids=None):
        pids = self.of.everything(host) if pids is None else pids
        send(pids, signal.SIGSTOP)
        return f"stop {what}", self.random.uniform(0.5, 9.0), lambda: send(pids, signal.SIGCONT)

    def freeze(self):
        cell = self.some_cell()
        return self.frozen(cell, f"everything of {cell}")

    def cut_off(self):
        host = self.random.choice([*CELLS, self.some_cell(), *NODES, *PROXIES])
        sh("ip", "-n", HUB, "link", "set", f"v-{host}", "down")
        return f"cut {host} off", self.random.uniform(0.5, 9.0), lambda: sh("ip", "-n", HUB, "link", "set", f"v-{host}", "up")

    def deaf(self, host, to):
        """What the one sends to the other goes nowhere."""
        its = namespace(host)
        neighbour = ["neigh", "replace", HOSTS[to], "lladdr", NOBODY, "dev", "eth0", "nud", "permanent"]
        sh("ip", "-n", its, *neighbour)
        return lambda: sh("ip", "-n", its, "neigh", "del", HOSTS[to], "dev", "eth0", check=False)

    def one_way(self):
        host = self.random.choice([self.some_cell(), *HOSTS])
        to = self.random.choice([other for other in HOSTS if other != host])
        return f"nothing of {host} reaches {to}", self.random.uniform(0.5, 9.0), self.deaf(host, to)

    def apart(self):
        """Two groups of hosts that do not hear each other."""
        hosts = list(HOSTS)
        self.random.shuffle(hosts)
        here, there = hosts[: len(hosts) // 2], hosts[len(hosts) // 2 :]
        mends = [self.deaf(*pair) for one in here for other in there for pair in ((one, other), (other, one))]
        return f"{' '.join(sorted(here))} apart from {' '.join(sorted(there))}", self.random.uniform(0.5, 9.0), lambda: [mend() for mend in mends]

    def control(self):
        node = self.of.seat() if self.random.random() < 0.7 else self.random.choice(NODES)
        send([self.of.running[node].pid], signal.SIGKILL)
        self.of.running[node].wait()
        return f"kill control {node}", self.random.uniform(0.1, 6.0), self.start_again(node)

    def freeze_control(self):
        node = self.of.seat()
        return self.frozen(node, f"control {node}")

    def proxy(self):
        proxy = self.random.choice(PROXIES)
        send([self.of.running[proxy].pid], signal.SIGKILL)
        self.of.running[proxy].wait()
        return f"kill proxy {proxy}", self.random.uniform(0.1, 3.0), self.start_again(proxy)

    def freeze_proxy(self):
        proxy = self.random.choice(PROXIES)
        return self.frozen(proxy, f"proxy {proxy}")

    def store(self):
        if self.random.random() < 0.5:
            return self.frozen("e", "etcd")
        send([self.of.running["e"].pid], signal.SIGKILL)
        self.of.running["e"].wait()
        return "kill etcd", self.random.uniform(0.1, 9.0), self.start_again("e")

    def switchover(self):
        to = self.random.choice(CELLS)
        threading.Thread(target=lambda: self.try_to("switchover", "shop", "--to", to, "--on-timeout", "force"), daemon=True).start()
        return f"switch over to {to}", 0.0, lambda: None

    def try_to(self, *args):
        try:
            self.of.command(*args)
        except RuntimeError:
            pass


def main():
    holdfast, directory = sys.argv[1], pathlib.Path(sys.argv[2])
    seconds = float(sys.argv[3]) if len(sys.argv) > 3 else 300.0
    seed = int(sys.argv[4]) if len(sys.argv) > 4 else random.randrange(1_000_000)
    make_network()
    in_hub()
    is_shared = seed % 3 != 0
    installation = Installation(holdfast, directory, is_shared)
    try:
        code = torture(installation, seconds, seed)
    finally:
        installation.stop()
    print(f"logs and data are in {directory}" if code else "nothing to complain of", flush=True)
    return code


def torture(installation, seconds, seed):
    with psycopg.connect(installation.dsn("p1"), autocommit=True) as client:
        client.execute("CREATE TABLE written (n bigint)")
        client.execute("CREATE TABLE counted (writer int PRIMARY KEY, n bigint)")
        client.execute("INSERT INTO counted SELECT g, 0 FROM generate_series(0, 9) g")
    writers = [Writer(installation, number, PROXIES[number % 2]) for number in range(WRITERS)]
    faults, began = Faults(installation, seed), time.monotonic()
    print(f"seed {seed}, {seconds:.0f} s, {'shared servers' if installation.is_shared else 'a server for each session'}", flush=True)
    broken = []
    count = 0
    while time.monotonic() - began < seconds:
        time.sleep(faults.random.uniform(0.2, 4.0))
        now = time.monotonic()
        for until, text, mend in [one for one in broken if one[0] <= now]:
            mend()
        broken = [one for one in broken if one[0] > now]
        # Two at once at most: where all is broken nothing can be shown.
        if len(broken) >= 2:
            continue
        text, lasts, mend = faults.next()
        count += 1
        print(f"{now - began:7.1f} {text}" + (f" for {lasts:.1f} s" if lasts else ""), flush=True)
        if lasts:
            broken.append((time.monotonic() + lasts, text, mend))
    for _, _, mend in broken:
        mend()
    for host in HOSTS:
        if not installation.is_running(host):
            installation.start(host)
    mended = time.monotonic()
    complaints = []
    try:
        wait("all to be in order again", installation.is_in_order, MENDED_S)
        wait("proxies", lambda: all(installation.value(proxy, "SELECT 1") == 1 for proxy in PROXIES), MENDED_S)
    except RuntimeError as error:
        complaints.append(str(error))
        print(installation.command("status", "shop"))
    print(f"in order again after {time.monotonic() - mended:.1f} s", flush=True)
    time.sleep(2.0)
    if not all([writer.stop() for writer in writers]):
        complaints.append("a client was left without an answer")
    there = {}
    with psycopg.connect(installation.dsn("p1"), autocommit=True) as client:
        for (row,) in client.execute("SELECT n FROM written"):
            there[row] = there.get(row, 0) + 1
        counts = dict(client.execute("SELECT writer, n FROM counted").fetchall())
    times = sorted(at for writer in writers for at, _ in writer.acknowledged)
    gaps = [(after - before, before - began) for before, after in zip(times, times[1:])]
    longest = max((gap for gap, _ in gaps), default=seconds)
    for gap, since in gaps:
        if gap > GAP_S:
            print(f"{since:7.1f} no commit for {gap:.1f} s", flush=True)
    told = {}
    for writer in writers:
        rows = {row for _, row in writer.acknowledged}
        lost = sorted(row for row in rows if row not in there)
        done = sorted(row for row in writer.refused if row in there)
        if lost:
            complaints.append(f"writer {writer.number}: {len(lost)} acknowledged and lost: {lost[:5]}")
        if done:
            complaints.append(f"writer {writer.number}: {len(done)} refused and done: {done[:5]}")
        if writer.wrong:
            complaints.append(f"writer {writer.number}: settings of its session are others: {writer.wrong[:5]}")
        blocks = sum(1 for row in there if row % WRITERS == writer.number and row // WRITERS % 3 == 0)
        if counts[writer.number] != blocks:
            complaints.append(f"writer {writer.number}: {counts[writer.number]} counted, {blocks} blocks are there: half a transaction")
        for state, times_told in writer.told.items():
            told[state] = told.get(state, 0) + times_told
    twice = sorted(row for row, times_there in there.items() if times_there > 1)
    if twice:
        complaints.append(f"{len(twice)} rows are there twice: {twice[:5]}")
    total = lambda what: sum(len(getattr(writer, what)) for writer in writers)
    print(
        f"{count} faults; {total('acknowledged')} acknowledged, {total('refused')} refused, {total('unknown')} unknown; "
        f"longest without a commit {longest:.1f} s; {sum(writer.connections for writer in writers)} connections; told {told}", flush=True
    )
    for complaint in complaints:
        print(f"COMPLAINT: {complaint}", flush=True)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
