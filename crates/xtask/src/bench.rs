//! Measures Holdfast beside a direct connection and pgbouncer, in rotation in one run: ratios are the result,
//! absolute figures are for orientation only. Every figure is the median of the rounds.

use std::collections::BTreeMap;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::{Done, build_release, output, run as run_program, setup};

const BIN: &str = "/usr/lib/postgresql/15/bin";
const ROUNDS: usize = 5;

/// A directory that the servers' user can get into; a clone in somebody's home may not be.
pub(crate) fn scratch() -> PathBuf {
    std::env::temp_dir().join("holdfast-xtask")
}

/// A program as the servers' user: PostgreSQL does not run as root.
pub(crate) fn as_postgres(program: &str) -> Command {
    if setup::is_root() {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=postgres", "--regid=postgres", "--init-groups", program]);
        command
    } else {
        Command::new(program)
    }
}

pub(crate) fn give_to_postgres(dir: &Path) -> Done {
    if setup::is_root() {
        run_program(Command::new("chown").arg("-R").arg("postgres:").arg(dir))
    } else {
        Ok(())
    }
}

pub(crate) fn open_to_all(dir: &Path) -> Done {
    run_program(Command::new("chmod").args(["-R", "a+rX"]).arg(dir))
}

fn free_port() -> Result<u16, String> {
    let listener = TcpListener::bind("127.0.0.1:0").map_err(|error| error.to_string())?;
    listener.local_addr().map(|address| address.port()).map_err(|error| error.to_string())
}

fn wait_for(port: u16) -> Done {
    let deadline = Instant::now() + Duration::from_secs(30);
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        if Instant::now() > deadline {
            return Err(format!("nothing listens on port {port} after 30 s"));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// A throw-away server.
pub(crate) struct Cluster {
    dir: PathBuf,
    pub(crate) port: u16,
}

impl Cluster {
    pub(crate) fn start(dir: &Path, settings: &str) -> Result<Cluster, String> {
        let _ = std::fs::remove_dir_all(dir);
        std::fs::create_dir_all(dir).map_err(|error| error.to_string())?;
        give_to_postgres(dir)?;
        let data = dir.join("data");
        let data = data.to_str().unwrap_or_default();
        let args =
            ["-D", data, "-U", "postgres", "--auth=trust", "-E", "UTF8", "--locale=C.UTF-8", "-N"];
        output(as_postgres(&format!("{BIN}/initdb")).args(args).current_dir(dir))?;
        let port = free_port()?;
        let options = format!(
            "-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={} -c shared_buffers=512MB \
             -c max_connections=300 -c max_prepared_transactions=10 -c autovacuum=off {settings}",
            dir.display()
        );
        let log = format!("{}/log", dir.display());
        let cluster = Cluster { dir: dir.to_owned(), port };
        run_program(
            as_postgres(&format!("{BIN}/pg_ctl"))
                .args(["start", "-s", "-w", "-D", data, "-l", &log, "-o", &options])
                .stdout(Stdio::null())
                .current_dir(dir),
        )?;
        Ok(cluster)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let data = self.dir.join("data");
        let stop = ["stop", "-s", "-m", "immediate", "-D", data.to_str().unwrap_or_default()];
        let _ = run_program(as_postgres(&format!("{BIN}/pg_ctl")).args(stop).current_dir("/"));
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// A running proxy of either kind.
pub(crate) struct Holdfast {
    child: Child,
    pub(crate) port: u16,
}

impl Holdfast {
    pub(crate) fn start(
        binary: &Path,
        dir: &Path,
        server: u16,
        auth: &str,
        more: &str,
        of_app: &str,
    ) -> Result<Holdfast, String> {
        let _ = std::fs::remove_dir_all(dir);
        std::fs::create_dir_all(dir).map_err(|error| error.to_string())?;
        let (port, api, other) = (free_port()?, free_port()?, free_port()?);
        let config = format!(
            "[proxy]\nlisten = [\"127.0.0.1:{port}\"]\nclients_max = 9000\n{more}\n[control]\nlisten = \"127.0.0.1:{api}\"\n\
             state_dir = \"{}/state\"\n[[app]]\nname = \"bench\"\nauth = \"{auth}\"\nsslmode = \"disable\"\n{of_app}\n\
             [[app.cell]]\nname = \"a\"\nserver = \"127.0.0.1:{server}\"\nactive = true\n\
             [[app.cell]]\nname = \"b\"\nserver = \"127.0.0.1:{other}\"\n",
            dir.display()
        );
        let path = dir.join("holdfast.toml");
        std::fs::write(&path, config).map_err(|error| error.to_string())?;
        let child = Command::new(binary)
            .args(["run", "-c"])
            .arg(&path)
            .env("HOLDFAST_LOG", "warn")
            .stdin(Stdio::null())
            .spawn()
            .map_err(|error| error.to_string())?;
        let proxy = Holdfast { child, port };
        wait_for(port)?;
        Ok(proxy)
    }

    /// `mode` is `session` or `transaction`, with so many server connections.
    fn pgbouncer(dir: &Path, server: u16, mode: &str, size: u16) -> Result<Holdfast, String> {
        let _ = std::fs::remove_dir_all(dir);
        std::fs::create_dir_all(dir).map_err(|error| error.to_string())?;
        let port = free_port()?;
        let config = format!(
            "[databases]\n* = host=127.0.0.1 port={server}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n\
             auth_type = trust\nauth_file = {dir}/users\npool_mode = {mode}\ndefault_pool_size = {size}\n\
             max_client_conn = 12000\nlog_connections = 0\nlog_disconnections = 0\nlogfile = {dir}/log\n\
             unix_socket_dir =\nignore_startup_parameters = extra_float_digits\n",
            dir = dir.display()
        );
        std::fs::write(dir.join("pgbouncer.ini"), config).map_err(|error| error.to_string())?;
        std::fs::write(dir.join("users"), "\"postgres\" \"\"\n")
            .map_err(|error| error.to_string())?;
        give_to_postgres(dir)?;
        let child = as_postgres("/usr/sbin/pgbouncer")
            .arg("-q")
            .arg(dir.join("pgbouncer.ini"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| error.to_string())?;
        let proxy = Holdfast { child, port };
        wait_for(port)?;
        Ok(proxy)
    }

    /// CPU seconds so far, of all threads.
    fn cpu(&self) -> f64 {
        let stat =
            std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap_or_default();
        let fields: Vec<&str> =
            stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks =
            |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
        // utime and stime, in ticks of 10 ms (`man proc`).
        (ticks(11) + ticks(12)) / 100.0
    }

    /// Resident memory in KiB.
    fn rss(&self) -> f64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))
            .unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0.0)
    }
}

impl Drop for Holdfast {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

pub(crate) fn run(args: &[String]) -> Done {
    setup::servers()?;
    setup::install(if Path::new("/usr/sbin/pgbouncer").exists() {
        vec![]
    } else {
        vec!["pgbouncer"]
    })?;
    let binary = build_release()?;
    match args.first().map(String::as_str) {
        None | Some("pgbench") => pgbench(&binary, args.get(1..).unwrap_or_default()),
        Some("bulk") => bulk(&binary),
        Some("idle") => idle(&binary),
        Some("login") => login(&binary),
        Some("pool") => pool(&binary, args.get(1..).unwrap_or_default()),
        Some("policy") => policy(&binary, args.get(1..).unwrap_or_default()),
        Some("pause") => pause(&binary, args.get(1).map_or("100", String::as_str)),
        Some(other) => Err(format!(
            "`{other}` cannot be measured: pgbench, pool, policy, bulk, idle, login or pause"
        )),
    }
}

/// What one run of pgbench gave.
struct Sample {
    tps: f64,
    cpu_per_100k: f64,
    p99_ms: f64,
    average_ms: f64,
}

/// One run, with the proxy's CPU time beside it. Transactions are logged for the percentile.
fn sample(
    port: u16,
    proxy: Option<&Holdfast>,
    kind: &[&str],
    clients: usize,
    seconds: u64,
    dir: &Path,
) -> Result<Sample, String> {
    let before = proxy.map_or(0.0, Holdfast::cpu);
    let prefix = dir.join("pgbench");
    let threads = clients.min(2).to_string();
    let text = output(
        Command::new(format!("{BIN}/pgbench"))
            .args(["-n", "-h", "127.0.0.1", "-U", "postgres"])
            .args(kind)
            .args([
                "-p",
                &port.to_string(),
                "-c",
                &clients.to_string(),
                "-j",
                &threads,
                "-T",
                &seconds.to_string(),
            ])
            .args(["-l", "--sampling-rate=0.1", "--log-prefix"])
            .arg(&prefix)
            .arg("postgres"),
    )?;
    let cpu = proxy.map_or(0.0, Holdfast::cpu) - before;
    let number = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split('=').nth(1)?.split_whitespace().next()?.parse::<f64>().ok())
    };
    let tps = number("tps").ok_or("pgbench gives no tps")?;
    let processed = text
        .lines()
        .find_map(|line| line.strip_prefix("number of transactions actually processed: "));
    let processed: f64 =
        processed.and_then(|text| text.split('/').next()?.trim().parse().ok()).unwrap_or(f64::NAN);
    let mut latencies = Vec::new();
    for file in std::fs::read_dir(dir)
        .map_err(|error| error.to_string())?
        .flatten()
        .map(|entry| entry.path())
    {
        if file.file_name().is_some_and(|name| name.to_string_lossy().starts_with("pgbench.")) {
            let lines = std::fs::read_to_string(&file).unwrap_or_default();
            latencies.extend(
                lines.lines().filter_map(|line| line.split(' ').nth(2)?.parse::<f64>().ok()),
            );
            let _ = std::fs::remove_file(&file);
        }
    }
    latencies.sort_by(f64::total_cmp);
    let p99 = latencies.get(latencies.len() * 99 / 100).copied().unwrap_or(f64::NAN);
    Ok(Sample {
        tps,
        cpu_per_100k: cpu / processed * 100_000.0,
        p99_ms: p99 / 1_000.0,
        average_ms: number("latency average").unwrap_or(f64::NAN),
    })
}

fn pgbench(binary: &Path, args: &[String]) -> Done {
    let seconds = args.first().and_then(|text| text.parse().ok()).unwrap_or(4);
    let dir = scratch().join("bench");
    let cluster = Cluster::start(&dir.join("cluster"), "")?;
    println!("filling pgbench's tables (scale 10)");
    let port = cluster.port.to_string();
    let init =
        ["-i", "-q", "-s", "10", "-h", "127.0.0.1", "-U", "postgres", "-p", &port, "postgres"];
    output(Command::new(format!("{BIN}/pgbench")).args(init))?;
    let holdfast = Holdfast::start(binary, &dir.join("holdfast"), cluster.port, "trust", "", "")?;
    let pgbouncer = Holdfast::pgbouncer(&dir.join("pgbouncer"), cluster.port, "session", 150)?;
    let contestants = [
        ("direct", cluster.port, None),
        ("pgbouncer", pgbouncer.port, Some(&pgbouncer)),
        ("holdfast", holdfast.port, Some(&holdfast)),
    ];
    println!("{ROUNDS} rounds of {seconds} s, in rotation; medians");
    println!(
        "mode      clients  contestant      tps  /direct  /pgbouncer  cpu s/100k  /pgbouncer  p99 ms  avg ms"
    );
    for mode in ["simple", "extended", "prepared"] {
        for clients in [1, 8, 32, 128] {
            let mut samples: BTreeMap<&str, Vec<Sample>> = BTreeMap::new();
            for round in 0..ROUNDS {
                for at in 0..contestants.len() {
                    let (name, port, proxy) = &contestants[(round + at) % contestants.len()];
                    samples.entry(name).or_default().push(sample(
                        *port,
                        *proxy,
                        &["-S", "-M", mode],
                        clients,
                        seconds,
                        &dir,
                    )?);
                }
            }
            let of = |name: &str, read: fn(&Sample) -> f64| {
                median(samples.get(name).into_iter().flatten().map(read).collect())
            };
            for (name, ..) in &contestants {
                let (tps, cpu) = (of(name, |s| s.tps), of(name, |s| s.cpu_per_100k));
                println!(
                    "{mode:<9} {clients:>7}  {name:<10} {tps:>8.0} {:>8.2} {:>11.2} {cpu:>11.2} {:>11.2} {:>7.2} {:>7.3}",
                    tps / of("direct", |s| s.tps),
                    tps / of("pgbouncer", |s| s.tps),
                    cpu / of("pgbouncer", |s| s.cpu_per_100k),
                    of(name, |s| s.p99_ms),
                    of(name, |s| s.average_ms),
                );
            }
        }
    }
    Ok(())
}

/// Clients that share 20 server connections, a transaction at a time, beside pgbouncer doing the same. It cannot
/// prepare statements there. pgbench waits for each answer to a Parse with all of its clients, those included that
/// have the servers, so transactions of several statements cannot be measured with it when they are prepared.
fn pool(binary: &Path, args: &[String]) -> Done {
    const SIZE: u16 = 20;
    let number = |at: usize| args.get(at).and_then(|text| text.parse().ok());
    let (seconds, clients) = (number(0).unwrap_or(4), number(1).unwrap_or(2_000));
    let clients = usize::try_from(clients).unwrap_or(1);
    let dir = scratch().join("bench");
    let cluster = Cluster::start(&dir.join("cluster"), "-c synchronous_commit=off")?;
    let port = cluster.port.to_string();
    let init =
        ["-i", "-q", "-s", "50", "-h", "127.0.0.1", "-U", "postgres", "-p", &port, "postgres"];
    output(Command::new(format!("{BIN}/pgbench")).args(init))?;
    let limits = format!("pool = \"transaction\"\npool_size = {SIZE}");
    let holdfast =
        Holdfast::start(binary, &dir.join("holdfast"), cluster.port, "trust", "", &limits)?;
    let pgbouncer = Holdfast::pgbouncer(&dir.join("pgbouncer"), cluster.port, "transaction", SIZE)?;
    let contestants =
        [("pgbouncer", pgbouncer.port, &pgbouncer), ("holdfast", holdfast.port, &holdfast)];
    println!(
        "{clients} clients on {SIZE} server connections, {ROUNDS} rounds of {seconds} s, in rotation; medians"
    );
    println!(
        "kind              contestant      tps  /pgbouncer  cpu s/100k  /pgbouncer   p99 ms  avg ms"
    );
    let kinds: [(&str, &[&str]); 4] = [
        ("select simple", &["-S", "-M", "simple"]),
        ("select extended", &["-S", "-M", "extended"]),
        ("select prepared", &["-S", "-M", "prepared"]),
        ("tpcb simple", &["-M", "simple"]),
    ];
    for (name, kind) in kinds {
        let mut samples: BTreeMap<&str, Vec<Sample>> = BTreeMap::new();
        for round in 0..ROUNDS {
            for at in 0..contestants.len() {
                let (who, port, proxy) = contestants[(round + at) % contestants.len()];
                if who == "pgbouncer" && name.ends_with("prepared") {
                    continue;
                }
                let sample = sample(port, Some(proxy), kind, clients, seconds, &dir)?;
                samples.entry(who).or_default().push(sample);
            }
        }
        let of = |who: &str, read: fn(&Sample) -> f64| {
            median(samples.get(who).into_iter().flatten().map(read).collect())
        };
        for (who, ..) in contestants.iter().filter(|(who, ..)| samples.contains_key(who)) {
            let (tps, cpu) = (of(who, |s| s.tps), of(who, |s| s.cpu_per_100k));
            println!(
                "{name:<17} {who:<10} {tps:>8.0} {:>11.2} {cpu:>11.2} {:>11.2} {:>8.1} {:>7.2}",
                tps / of("pgbouncer", |s| s.tps),
                cpu / of("pgbouncer", |s| s.cpu_per_100k),
                of(who, |s| s.p99_ms),
                of(who, |s| s.average_ms),
            );
        }
    }
    Ok(())
}

/// What it costs to judge every command: two of Holdfast side by side, of which one has a rule about the active cell that
/// is about nobody here. Statements of a thousand texts, that are known after a moment, and of a million.
fn policy(binary: &Path, args: &[String]) -> Done {
    const RULE: &str = "[app.policy]\n[[app.policy.rule]]\nname = \"none\"\nclasses = [\"definition\"]\n\
        roles = [\"nobody\"]\ndisposition = \"refuse\"\n";
    let number = |at: usize| args.get(at).and_then(|text| text.parse().ok());
    let (seconds, clients) = (number(0).unwrap_or(4), number(1).unwrap_or(8));
    let clients = usize::try_from(clients).unwrap_or(1);
    let dir = scratch().join("bench");
    let cluster = Cluster::start(&dir.join("cluster"), "")?;
    let port = cluster.port.to_string();
    let init =
        ["-i", "-q", "-s", "10", "-h", "127.0.0.1", "-U", "postgres", "-p", &port, "postgres"];
    output(Command::new(format!("{BIN}/pgbench")).args(init))?;
    let few = dir.join("few.sql");
    let text =
        "\\set aid random(1, 1000)\nSELECT abalance FROM pgbench_accounts WHERE aid = :aid;\n";
    std::fs::write(&few, text).map_err(|error| error.to_string())?;
    let few = few.display().to_string();
    let plain = Holdfast::start(binary, &dir.join("plain"), cluster.port, "trust", "", "")?;
    let judges = Holdfast::start(binary, &dir.join("judges"), cluster.port, "trust", "", RULE)?;
    let contestants = [("plain", &plain), ("judges", &judges)];
    println!("{clients} clients, {ROUNDS} rounds of {seconds} s, in rotation; medians");
    println!("kind               contestant      tps  /plain  cpu s/100k  /plain  p99 ms");
    let kinds: [(&str, &[&str]); 4] = [
        ("prepared", &["-S", "-M", "prepared"]),
        ("extended, 1000", &["-M", "extended", "-f", &few]),
        ("simple, 1000", &["-M", "simple", "-f", &few]),
        ("simple, 1000000", &["-S", "-M", "simple"]),
    ];
    for (name, kind) in kinds {
        let mut samples: BTreeMap<&str, Vec<Sample>> = BTreeMap::new();
        for round in 0..ROUNDS {
            for at in 0..contestants.len() {
                let (who, proxy) = contestants[(round + at) % contestants.len()];
                let sample = sample(proxy.port, Some(proxy), kind, clients, seconds, &dir)?;
                samples.entry(who).or_default().push(sample);
            }
        }
        let of = |who: &str, read: fn(&Sample) -> f64| {
            median(samples.get(who).into_iter().flatten().map(read).collect())
        };
        for (who, _) in &contestants {
            let (tps, cpu) = (of(who, |s| s.tps), of(who, |s| s.cpu_per_100k));
            println!(
                "{name:<18} {who:<10} {tps:>8.0} {:>7.3} {cpu:>11.2} {:>7.3} {:>7.2}",
                tps / of("plain", |s| s.tps),
                cpu / of("plain", |s| s.cpu_per_100k),
                of(who, |s| s.p99_ms),
            );
        }
    }
    Ok(())
}

fn psql(port: u16, sql: &str) -> Command {
    let mut command = Command::new(format!("{BIN}/psql"));
    let port = port.to_string();
    command.args([
        "-X",
        "-q",
        "-A",
        "-t",
        "-h",
        "127.0.0.1",
        "-U",
        "postgres",
        "-p",
        &port,
        "-d",
        "postgres",
        "-c",
        sql,
    ]);
    command
}

/// 200 MB of COPY in both directions, and a SELECT of narrow rows: MB/s and CPU seconds per GB.
fn bulk(binary: &Path) -> Done {
    let dir = scratch().join("bench");
    let cluster = Cluster::start(&dir.join("cluster"), "")?;
    let holdfast = Holdfast::start(binary, &dir.join("holdfast"), cluster.port, "trust", "", "")?;
    let pgbouncer = Holdfast::pgbouncer(&dir.join("pgbouncer"), cluster.port, "session", 150)?;
    let set_up = "CREATE UNLOGGED TABLE wide AS SELECT i, repeat('x', 1000) AS t FROM generate_series(1, 200000) i; \
        CREATE UNLOGGED TABLE narrow AS SELECT i, repeat('y', 90) AS t FROM generate_series(1, 2000000) i; \
        CREATE UNLOGGED TABLE empty (i int, t text)";
    output(&mut psql(cluster.port, set_up))?;
    let file = dir.join("wide.copy");
    let out = format!("\\copy wide to '{}'", file.display());
    output(&mut psql(cluster.port, &out))?;
    let gigabytes = std::fs::metadata(&file).map_err(|error| error.to_string())?.len() as f64 / 1e9;
    let contestants = [
        ("direct", cluster.port, None),
        ("pgbouncer", pgbouncer.port, Some(&pgbouncer)),
        ("holdfast", holdfast.port, Some(&holdfast)),
    ];
    let kinds = [
        ("copy out wide", "\\copy wide to '/dev/null'".to_owned()),
        ("copy in wide", format!("\\copy empty from '{}'", file.display())),
        ("select narrow", "\\copy (select * from narrow) to '/dev/null'".to_owned()),
    ];
    println!(
        "{ROUNDS} rounds, in rotation; medians\nkind           contestant     MB/s  /direct  cpu s/GB"
    );
    for (kind, sql) in &kinds {
        let mut found: BTreeMap<&str, Vec<(f64, f64)>> = BTreeMap::new();
        for round in 0..ROUNDS {
            for at in 0..contestants.len() {
                let (name, port, proxy) = &contestants[(round + at) % contestants.len()];
                output(&mut psql(cluster.port, "TRUNCATE empty"))?;
                let (before, began) = (proxy.map_or(0.0, Holdfast::cpu), Instant::now());
                output(&mut psql(*port, sql))?;
                let took = began.elapsed().as_secs_f64();
                let cpu = proxy.map_or(0.0, Holdfast::cpu) - before;
                found.entry(name).or_default().push((gigabytes * 1_000.0 / took, cpu / gigabytes));
            }
        }
        let of = |name: &str, read: fn(&(f64, f64)) -> f64| {
            median(found.get(name).into_iter().flatten().map(read).collect())
        };
        for (name, ..) in &contestants {
            let (rate, cpu) = (of(name, |f| f.0), of(name, |f| f.1));
            println!(
                "{kind:<14} {name:<10} {rate:>8.0} {:>8.2} {cpu:>9.2}",
                rate / of("direct", |f| f.0)
            );
        }
    }
    Ok(())
}

/// Memory per idle client that is logged in: 2,000 of them, as many as a server here takes.
fn idle(binary: &Path) -> Done {
    const CLIENTS: usize = 5_000;
    let dir = scratch().join("bench");
    let cluster =
        Cluster::start(&dir.join("cluster"), "-c max_connections=5200 -c shared_buffers=128MB")?;
    let holdfast = Holdfast::start(binary, &dir.join("holdfast"), cluster.port, "trust", "", "")?;
    let warm: Vec<TcpStream> =
        (0..50).map(|_| raw_login(holdfast.port)).collect::<Result<_, _>>()?;
    let before = holdfast.rss();
    let began = Instant::now();
    let clients: Vec<TcpStream> =
        (0..CLIENTS).map(|_| raw_login(holdfast.port)).collect::<Result<_, _>>()?;
    let took = began.elapsed().as_secs_f64();
    std::thread::sleep(Duration::from_secs(2));
    let per_client = (holdfast.rss() - before) / CLIENTS as f64;
    let cpu = holdfast.cpu();
    std::thread::sleep(Duration::from_secs(3));
    let busy = (holdfast.cpu() - cpu) / 3.0 * 100.0;
    println!(
        "{CLIENTS} idle clients: {per_client:.2} KiB each, opened in {took:.1} s, {busy:.1} % CPU while idle"
    );
    drop((warm, clients));
    Ok(())
}

/// A login by trust, byte by byte: the startup packet, then everything up to ReadyForQuery.
fn raw_login(port: u16) -> Result<TcpStream, String> {
    use std::io::{Read, Write};
    let error = |error: std::io::Error| error.to_string();
    let mut socket = TcpStream::connect(("127.0.0.1", port)).map_err(error)?;
    let body = b"\0\x03\0\0user\0postgres\0database\0postgres\0\0";
    let len = u32::try_from(body.len() + 4).map_err(|error| error.to_string())?;
    socket.write_all(&len.to_be_bytes()).and_then(|()| socket.write_all(body)).map_err(error)?;
    let mut received = Vec::new();
    let mut chunk = [0; 4096];
    while !received.ends_with(b"Z\0\0\0\x05I") {
        let len = socket.read(&mut chunk).map_err(error)?;
        if len == 0 {
            return Err(format!("login was refused: {}", String::from_utf8_lossy(&received)));
        }
        received.extend_from_slice(&chunk[..len]);
    }
    Ok(socket)
}

/// Logins a second, by trust and by SCRAM, and the proxy's CPU time for each.
fn login(binary: &Path) -> Done {
    let dir = scratch().join("bench");
    let cluster = Cluster::start(&dir.join("cluster"), "")?;
    output(&mut psql(cluster.port, "CREATE ROLE app LOGIN PASSWORD 'sesame'"))?;
    for auth in ["trust", "scram"] {
        let holdfast = Holdfast::start(binary, &dir.join("holdfast"), cluster.port, auth, "", "")?;
        let (before, count) = (holdfast.cpu(), 1_000);
        let text = output(
            Command::new(format!("{BIN}/pgbench"))
                .args([
                    "-n",
                    "-C",
                    "-h",
                    "127.0.0.1",
                    "-U",
                    "app",
                    "-p",
                    &holdfast.port.to_string(),
                    "-c",
                    "10",
                    "-j",
                    "2",
                ])
                .args(["-t", &(count / 10).to_string()])
                .env("PGPASSWORD", "sesame")
                .args(["-f", script(&dir)?.to_str().unwrap_or_default(), "postgres"]),
        );
        let text = text?;
        let cpu = (holdfast.cpu() - before) * 1_000.0 / f64::from(count);
        let tps = text.lines().find(|line| line.starts_with("tps")).unwrap_or("no tps").to_owned();
        println!("{auth}: {tps}; {cpu:.3} CPU ms of the proxy for each login");
    }
    Ok(())
}

fn script(dir: &Path) -> Result<PathBuf, String> {
    let path = dir.join("one.sql");
    std::fs::write(&path, "SELECT 1;\n").map_err(|error| error.to_string())?;
    Ok(path)
}

/// The demo's switchover there and back, with that many sessions, several times.
fn pause(binary: &Path, sessions: &str) -> Done {
    for round in 1..=3 {
        println!("round {round}");
        let text = output(Command::new(binary).args(["demo", "--sessions", sessions]))?;
        text.lines()
            .filter(|line| {
                line.contains("held p50") || line.starts_with("to ") || line.starts_with("errors")
            })
            .for_each(|line| println!("  {line}"));
    }
    Ok(())
}
