"""Failover as clients see it: Holdfast with agents beside Patroni with HAProxy and etcd, in rotation.

Four clients together write a row every 5 ms, each commit by itself, and connect again at once after an error. The outage
is the longest time in which no client had a commit acknowledged. Afterwards every acknowledged row is looked for on the
primary. An intruder writes to the old primary past the proxy, until half a minute after another has taken its place.

Usage: compare.py HOLDFAST DIR ROUNDS [SCENARIO ...]; `cargo xtask bench failover` calls it.
"""

import json
import os
import pathlib
import pwd
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request

import psycopg

BIN = "/usr/lib/postgresql/15/bin"
CLIENTS = 4
SETTLE_S = 3.0
AFTER_S = 5.0
STORE_DOWN_S = 60.0
LONGEST_S = 75.0


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def unprivileged():
    """PostgreSQL does not run as root, and neither does what starts it."""
    if os.getuid() != 0:
        return {}
    user = pwd.getpwnam("postgres")
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def spawn(args, log, **more):
    with open(log, "ab") as out:
        return subprocess.Popen(args, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, **more)


def wait(what, is_so, limit=90.0):
    until = time.monotonic() + limit
    while time.monotonic() < until:
        try:
            if is_so():
                return
        except (OSError, psycopg.Error, ValueError, subprocess.SubprocessError):
            pass
        time.sleep(0.05)
    raise RuntimeError(f"waited {limit} s for {what}")


def tree(pid):
    """A process and what it has started, and what those have."""
    out = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in out.splitlines()]
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


def postmaster(data_dir):
    return int((pathlib.Path(data_dir) / "postmaster.pid").read_text().split()[0])


def value(port, sql):
    dsn = f"host=127.0.0.1 port={port} user=postgres dbname=postgres connect_timeout=2"
    with psycopg.connect(dsn, autocommit=True) as client:
        return client.execute(sql).fetchone()[0]


class Patroni:
    """Two members, one etcd, HAProxy. Times as short as Patroni takes them, checks every 100 ms."""

    def __init__(self, directory, is_sync, scenario):
        self.dir = directory
        self.processes = []
        self.members = {}
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        who = unprivileged()
        if who:
            os.chown(directory, who["user"], who["group"])
        client, peer = free_port(), free_port()
        etcd = [
            "/usr/bin/etcd", "--name", "one", "--data-dir", str(directory / "etcd"),
            "--listen-client-urls", f"http://127.0.0.1:{client}", "--advertise-client-urls", f"http://127.0.0.1:{client}",
            "--listen-peer-urls", f"http://127.0.0.1:{peer}", "--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}",
            "--initial-cluster", f"one=http://127.0.0.1:{peer}",
        ]
        self.etcd = etcd
        self.store_up()
        wait("etcd", lambda: urllib.request.urlopen(f"http://127.0.0.1:{client}/health").status == 200)
        for name in ("a", "b"):
            api, port = free_port(), free_port()
            data = directory / name
            config = {
                "scope": "compared", "name": name,
                "restapi": {"listen": f"127.0.0.1:{api}", "connect_address": f"127.0.0.1:{api}"},
                "etcd3": {"hosts": f"127.0.0.1:{client}"},
                "bootstrap": {
                    "dcs": {
                        "ttl": 20, "loop_wait": 1, "retry_timeout": 3, "maximum_lag_on_failover": 1048576,
                        "primary_start_timeout": 0, "synchronous_mode": is_sync,
                        # Off by default; at its best where the store is down.
                        "failsafe_mode": scenario == "store",
                        "postgresql": {"use_pg_rewind": True, "parameters": {
                            "wal_log_hints": "on", "wal_keep_size": "512MB", "wal_retrieve_retry_interval": "100ms",
                            "max_connections": 200, "shared_buffers": "128MB",
                        }},
                    },
                    "initdb": [{"encoding": "UTF8"}, {"locale": "C.UTF-8"}, "data-checksums"],
                },
                "postgresql": {
                    "listen": f"127.0.0.1:{port}", "connect_address": f"127.0.0.1:{port}", "data_dir": str(data), "bin_dir": BIN,
                    "pg_hba": ["local all all trust", "host all all 127.0.0.1/32 trust", "host replication all 127.0.0.1/32 trust"],
                    "authentication": {
                        "superuser": {"username": "postgres", "password": "x"},
                        "replication": {"username": "replicator", "password": "x"},
                        "rewind": {"username": "rewinder", "password": "x"},
                    },
                    "parameters": {"unix_socket_directories": str(directory)},
                    "pgpass": str(directory / f"{name}.pgpass"),
                },
                "watchdog": {"mode": "off"},
            }
            path = directory / f"{name}.yml"
            path.write_text(json.dumps(config))
            if who:
                os.chown(path, who["user"], who["group"])
            self.members[name] = {"api": api, "port": port, "data": data, "config": path}
            self.start(name)
            wait(f"member {name}", lambda: value(port, "SELECT 1") == 1)
        self.port = free_port()
        checks = "\n".join(
            f"  server {name} 127.0.0.1:{member['port']} check port {member['api']}"
            for name, member in self.members.items()
        )
        (directory / "haproxy.cfg").write_text(
            "defaults\n  mode tcp\n  timeout connect 2s\n  timeout client 60s\n  timeout server 60s\n"
            f"listen primary\n  bind 127.0.0.1:{self.port}\n  option httpchk OPTIONS /primary\n  option redispatch 1\n"
            "  http-check expect status 200\n"
            "  default-server inter 100ms fall 1 rise 1 on-marked-down shutdown-sessions\n" + checks + "\n"
        )
        self.processes.append(spawn(["haproxy", "-db", "-f", str(directory / "haproxy.cfg")], directory / "haproxy.log"))
        wait("HAProxy", lambda: not value(self.port, "SELECT pg_is_in_recovery()"))
        leader = self.members[self.primary()]["port"]
        what = "sync" if is_sync else "async"
        wait("a standby", lambda: value(leader, "SELECT max(sync_state) FROM pg_stat_replication WHERE state = 'streaming'") == what)

    def store_up(self):
        self.store = spawn(self.etcd, self.dir / "etcd.log", **unprivileged())
        self.processes.append(self.store)

    def store_down(self):
        send([self.store.pid], signal.SIGKILL)
        self.store.wait()

    def start(self, name):
        program = str(pathlib.Path(sys.executable).parent / "patroni")
        member = self.members[name]
        member["agent"] = spawn([program, str(member["config"])], self.dir / f"{name}.log", **unprivileged())
        self.processes.append(member["agent"])

    def primary(self):
        return next(n for n, m in self.members.items() if not value(m["port"], "SELECT pg_is_in_recovery()"))

    def server_port(self, name):
        return self.members[name]["port"]

    def switch(self, old, new):
        body = json.dumps({"leader": old, "candidate": new}).encode()
        url = f"http://127.0.0.1:{self.members[old]['api']}/switchover"
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"}, method="POST")
        urllib.request.urlopen(request, timeout=60).read()

    def server(self, name):
        return tree(postmaster(self.members[name]["data"]))

    def agent(self, name):
        return [self.members[name]["agent"].pid]

    def guard(self, name):
        return []

    def stop(self):
        pids = [pid for process in self.processes for pid in tree(process.pid)]
        for member in self.members.values():
            try:
                pids += tree(postmaster(member["data"]))
            except OSError:
                pass
        send(pids, signal.SIGCONT)
        send(pids, signal.SIGKILL)
        for process in self.processes:
            process.wait()


class Holdfast:
    """Two cells with an agent each, proxy and control in one process; another proxy where that is to be killed."""

    def __init__(self, directory, is_sync, scenario):
        self.dir = directory
        shutil.rmtree(directory, ignore_errors=True)
        args = [HOLDFAST, "demo", "--no-tour", "--sessions", "0", "--pool", "8", "--agents", "--dir", str(directory)]
        args += ["--acks", "1"] if is_sync else []
        args += self.more(scenario)
        log = directory.parent / f"{directory.name}.log"
        self.process = spawn(args, log, env={**os.environ, "HOLDFAST_LOG": "info"})
        path = directory / "demo.json"
        wait("the demo", lambda: path.exists() and json.loads(path.read_text()))
        self.facts = json.loads(path.read_text())
        port = lambda dsn: int(dsn.split("port=")[1].split()[0])
        self.port = port([self.facts["dsn"], *self.facts["proxies"]][-1])
        self.ports = {name: port(dsn) for name, dsn in self.facts["servers"].items()}
        self.agents = dict(zip(("a", "b"), self.facts["pids"]["agents"]))
        wait("all in order", lambda: "!" not in self.command("status"))

    def more(self, scenario):
        return ["--proxies", "2"] if scenario == "store" else []

    def store_down(self):
        send([self.process.pid], signal.SIGKILL)
        self.process.wait()

    def store_up(self):
        args = [HOLDFAST, "run", "-c", str(self.dir / "holdfast.toml")]
        self.process = spawn(args, self.dir / "control.log")

    def command(self, *args):
        args = [HOLDFAST, "--api", self.facts["api"], *args]
        return subprocess.run(args, capture_output=True, text=True, timeout=60).stdout

    def primary(self):
        return next(n for n, port in self.ports.items() if not value(port, "SELECT pg_is_in_recovery()"))

    def server_port(self, name):
        return self.ports[name]

    def switch(self, old, new):
        self.command("switchover", "shop", "--to", new)

    def server(self, name):
        return tree(postmaster(self.dir / name))

    def agent(self, name):
        return [self.agents[name]]

    def guard(self, name):
        out = subprocess.run(["pgrep", "-f", f"__guard .* {self.dir / name} "], capture_output=True, text=True).stdout
        return [int(pid) for pid in out.split()]

    def stop(self):
        pids = tree(self.process.pid) + list(self.agents.values()) + self.facts["pids"]["proxies"]
        pids += self.facts["pids"]["controls"] + [pid for pid in [self.facts["pids"]["etcd"]] if pid]
        for name in self.ports:
            pids += self.guard(name)
            try:
                pids += self.server(name)
            except OSError:
                pass
        send(pids, signal.SIGCONT)
        send(pids, signal.SIGKILL)
        self.process.wait()


class Nodes(Holdfast):
    """Three nodes of control with etcd; whichever is control is on the primary's host, and is lost with it."""

    def more(self, scenario):
        return ["--controls", "3"]

    def store_down(self):
        pid = self.facts["pids"]["etcd"]
        self.etcd = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]
        send([pid], signal.SIGKILL)

    def store_up(self):
        etcd = spawn(self.etcd, self.dir / "etcd.log")
        self.facts["pids"]["etcd"] = etcd.pid

    def guard(self, name):
        return super().guard(name) + [pid for pid in [self.control()] if pid]

    def control(self):
        for api, pid in zip(self.facts["api"].split(","), self.facts["pids"]["controls"]):
            asked = subprocess.run([HOLDFAST, "--api", api, "executions"], capture_output=True, timeout=60)
            if asked.returncode == 0:
                return pid


class Writers:
    def __init__(self, port):
        self.dsn = f"host=127.0.0.1 port={port} user=postgres dbname=postgres connect_timeout=2"
        self.acknowledged, self.errors, self.is_over = [], [], False
        self.lock = threading.Lock()
        self.threads = [threading.Thread(target=self.write, args=(number,)) for number in range(CLIENTS)]
        for thread in self.threads:
            thread.start()

    def write(self, first):
        client, number = None, first
        due = time.monotonic() + first * 0.005
        while not self.is_over:
            due = max(due + CLIENTS * 0.005, time.monotonic() - 0.02)
            time.sleep(max(0.0, due - time.monotonic()))
            number += CLIENTS
            try:
                if client is None:
                    client = psycopg.connect(self.dsn, autocommit=True)
                client.execute("INSERT INTO compared VALUES (%s)", (number,), prepare=False)
                with self.lock:
                    self.acknowledged.append((time.monotonic(), number))
            except psycopg.Error as error:
                with self.lock:
                    self.errors.append((time.monotonic(), error.sqlstate))
                if client is not None and client.closed:
                    client = None
                time.sleep(0.002)
        if client is not None:
            client.close()

    def stop(self):
        self.is_over = True
        for thread in self.threads:
            thread.join()


class Intruder:
    """Writes to one server past every proxy."""

    def __init__(self, port):
        self.dsn = f"host=127.0.0.1 port={port} user=postgres dbname=postgres connect_timeout=2"
        self.acknowledged, self.is_over = [], False
        # A commit that waits for a standby waits for ever, if there is none.
        self.thread = threading.Thread(target=self.write, daemon=True)
        self.thread.start()

    def write(self):
        client = None
        while not self.is_over:
            time.sleep(0.01)
            try:
                client = client or psycopg.connect(self.dsn, autocommit=True)
                row = client.execute("INSERT INTO intruded DEFAULT VALUES RETURNING n", prepare=False).fetchone()
                self.acknowledged.append((time.monotonic(), row[0]))
            except psycopg.Error:
                if client is not None and client.closed:
                    client = None

    def stop(self):
        self.is_over = True
        self.thread.join(5.0)


def trial(contestant, scenario, directory, is_sync):
    cluster = contestant(directory, is_sync, scenario)
    try:
        with psycopg.connect(f"host=127.0.0.1 port={cluster.port} user=postgres dbname=postgres", autocommit=True) as client:
            client.execute("CREATE TABLE compared (n bigint PRIMARY KEY)")
            client.execute("CREATE TABLE intruded (n bigserial)")
        old = cluster.primary()
        new = "b" if old == "a" else "a"
        writers = Writers(cluster.port)
        time.sleep(SETTLE_S)
        intruder = Intruder(cluster.server_port(old)) if scenario not in ("switchover", "store") else None
        time.sleep(0.2)
        began = time.monotonic()
        frozen = []
        if scenario == "switchover":
            cluster.switch(old, new)
        elif scenario == "postgres":
            send(cluster.server(old)[:1], signal.SIGKILL)
        elif scenario == "host":
            send(cluster.agent(old) + cluster.guard(old) + cluster.server(old), signal.SIGKILL)
        elif scenario == "agent":
            send(cluster.agent(old), signal.SIGKILL)
        elif scenario == "frozen":
            frozen = cluster.agent(old) + cluster.guard(old) + cluster.server(old)
            send(frozen, signal.SIGSTOP)
        elif scenario == "store":
            cluster.store_down()
            time.sleep(STORE_DOWN_S)
            cluster.store_up()
        deadline = time.monotonic() + LONGEST_S
        # Until clients have written for a while again, after an outage if there is to be one.
        while time.monotonic() < deadline:
            time.sleep(0.1)
            with writers.lock:
                times = [at for at, _ in writers.acknowledged if at > began - 0.5]
            gaps = [(after - before, after) for before, after in zip(times, times[1:])]
            longest, ended = max(gaps, default=(0.0, began))
            expects_outage = scenario in ("host", "frozen", "agent")
            is_quiet = not times or time.monotonic() - times[-1] > 0.3
            if not is_quiet and time.monotonic() - max(ended, began) > AFTER_S and (longest > 0.3 or not expects_outage):
                break
        if frozen:
            send(frozen, signal.SIGCONT)
            time.sleep(10)
        writers.stop()
        zombies, late = 0, 0
        with writers.lock:
            times = [at for at, _ in writers.acknowledged if at > began - 0.5]
        gaps = [(after - before, after) for before, after in zip(times, times[1:])]
        longest, ended = max(gaps, default=(LONGEST_S, deadline))
        moved = value(cluster.port, "SELECT current_setting('port')") != str(cluster.server_port(old))
        if intruder is not None:
            if moved:
                time.sleep(max(0.0, ended + 30.0 - time.monotonic()))
            intruder.stop()
            past = [number for at, number in intruder.acknowledged if moved and at > ended]
            with psycopg.connect(f"host=127.0.0.1 port={cluster.port} user=postgres dbname=postgres") as client:
                kept = {row[0] for row in client.execute("SELECT n FROM intruded")}
            # One that was replicated before, and is acknowledged when its server wakes up, is not written past anybody.
            late = sum(1 for number in past if number in kept)
            zombies = len(past) - late
        lost = 0
        numbers = [number for _, number in writers.acknowledged]
        with psycopg.connect(f"host=127.0.0.1 port={cluster.port} user=postgres dbname=postgres", autocommit=True) as client:
            there = {row[0] for row in client.execute("SELECT n FROM compared")}
        lost = sum(1 for number in numbers if number not in there)
        errors = sum(1 for at, _ in writers.errors if at > began)
        after = ended - longest - began
        found = {"outage": longest, "after": after, "errors": errors, "lost": lost}
        return {**found, "zombies": zombies, "late": late, "moved": moved}
    finally:
        cluster.stop()


def main():
    global HOLDFAST
    HOLDFAST, base, rounds = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3])
    scenarios = sys.argv[4:] or ["switchover", "postgres", "host", "agent", "frozen", "store"]
    base.mkdir(parents=True, exist_ok=True)
    base.chmod(0o755)
    contestants = [("Patroni", Patroni), ("Holdfast", Holdfast), ("with etcd", Nodes)]
    print("scenario    contestant  n  outage s: median, min-max  errors  acknowledged and lost  written past the new primary", flush=True)
    for scenario in scenarios:
        results = {name: [] for name, _ in contestants}
        for number in range(rounds):
            for name, contestant in contestants:
                try:
                    result = trial(contestant, scenario, base / f"{name.lower().replace(' ', '-')}-{scenario}-{number}", True)
                    results[name].append(result)
                    print(f"  {scenario} {name} {result}", file=sys.stderr, flush=True)
                except RuntimeError as error:
                    print(f"  {scenario} {name}: {error}", file=sys.stderr, flush=True)
        for name, all_of in results.items():
            if not all_of:
                continue
            outages = [one["outage"] for one in all_of]
            total = lambda key: sum(one[key] for one in all_of)
            errors = statistics.median(one["errors"] for one in all_of)
            print(
                f"{scenario:<11} {name:<11} {len(all_of)}  {statistics.median(outages):.2f}, {min(outages):.2f}-{max(outages):.2f}"
                f"  {errors:g}  {total('lost')}  {total('zombies')}", flush=True
            )


main()
