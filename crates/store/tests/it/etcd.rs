//! The store of etcd, on a real one: what every store does, and what becomes of a transaction whose answer is lost.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use pg::Port;
use store::etcd::{EtcdConfig, EtcdLogin, EtcdStore, EtcdTls};
use store::{Store, StoreError, Txn};

use crate::{Dir, conforms};

/// Members of one cluster.
struct Etcd {
    dirs: Vec<Dir>,
    ports: Vec<[Port; 2]>,
    members: Vec<Child>,
    /// Where the certificates are by which it and its clients know each other.
    certificates: Option<Dir>,
}

impl Etcd {
    fn start(name: &str, count: usize) -> Etcd {
        Etcd::start_by(name, count, None)
    }

    fn start_by(name: &str, count: usize, certificates: Option<Dir>) -> Etcd {
        let dirs = (0..count).map(|n| Dir::new(&format!("{name}-{n}"))).collect();
        let ports = (0..count).map(|_| [Port::reserve().unwrap(), Port::reserve().unwrap()]);
        let mut etcd = Etcd { dirs, ports: ports.collect(), members: Vec::new(), certificates };
        etcd.members = (0..count).map(|at| etcd.spawn(at)).collect();
        etcd.wait();
        etcd
    }

    fn url(&self, client: &Port) -> String {
        let scheme = if self.certificates.is_some() { "https" } else { "http" };
        format!("{scheme}://127.0.0.1:{}", client.number())
    }

    fn spawn(&self, at: usize) -> Child {
        let url = |port: &Port| format!("http://127.0.0.1:{}", port.number());
        let [client, peer] = &self.ports[at];
        let clients = self.url(client);
        let certificates = self.certificates.iter().flat_map(|Dir(dir)| {
            [
                ("--cert-file", "member.crt"),
                ("--key-file", "member.key"),
                ("--trusted-ca-file", "ca.crt"),
            ]
            .map(|(flag, file)| format!("{flag}={}", dir.join(file).display()))
        });
        let all = self.ports.iter().enumerate().map(|(n, [_, peer])| format!("m{n}={}", url(peer)));
        Command::new("etcd")
            .args(["--name", &format!("m{at}"), "--data-dir", &self.dirs[at].0.to_string_lossy()])
            .args(["--listen-client-urls", &clients, "--advertise-client-urls", &clients])
            .args(certificates)
            .args(self.certificates.iter().map(|_| "--client-cert-auth"))
            .args(["--listen-peer-urls", &url(peer), "--initial-advertise-peer-urls", &url(peer)])
            .args(["--initial-cluster", &all.collect::<Vec<_>>().join(",")])
            .args(["--heartbeat-interval", "50", "--election-timeout", "500"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    }

    fn wait(&self) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while EtcdStore::open(self.config("first"), 1).is_err() {
            assert!(Instant::now() < deadline, "etcd does not start");
        }
    }

    fn config(&self, node: &str) -> EtcdConfig {
        let tls = self.certificates.as_ref().map(|Dir(dir)| EtcdTls {
            ca: dir.join("ca.crt"),
            identity: Some((dir.join("node.crt"), dir.join("node.key"))),
        });
        EtcdConfig {
            endpoints: self.ports.iter().map(|[client, _]| self.url(client)).collect(),
            prefix: "/holdfast/".into(),
            node: node.into(),
            tls,
            login: None,
            attempt_max: Duration::from_secs(2),
            total_max: Duration::from_secs(20),
        }
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        for member in &mut self.members {
            let _ = member.kill();
            let _ = member.wait();
        }
    }
}

/// An authority, and a certificate and key of it for each of these names.
fn certify(name: &str, names: &[&str]) -> Dir {
    let dir = Dir::new(name);
    std::fs::create_dir_all(&dir.0).unwrap();
    let write = |file: String, text: String| std::fs::write(dir.0.join(file), text).unwrap();
    let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let key = rcgen::KeyPair::generate().unwrap();
    write("ca.crt".into(), params.self_signed(&key).unwrap().pem());
    let authority = rcgen::Issuer::new(params, key);
    for name in names {
        let mut params = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        params.distinguished_name.push(rcgen::DnType::CommonName, *name);
        let key = rcgen::KeyPair::generate().unwrap();
        write(format!("{name}.crt"), params.signed_by(&key, &authority).unwrap().pem());
        write(format!("{name}.key"), key.serialize_pem());
    }
    dir
}

/// A way to a member, on which every so many answers are lost, before or after the member has got the request.
struct Way {
    address: String,
    lost: Arc<AtomicUsize>,
    _port: Port,
}

impl Way {
    fn to(member: u16, every: usize) -> Way {
        let port = Port::reserve().unwrap();
        let listener = TcpListener::bind(("127.0.0.1", port.number())).unwrap();
        let address = format!("http://127.0.0.1:{}", port.number());
        let lost = Arc::new(AtomicUsize::new(0));
        let (count, cut) = (Arc::new(AtomicUsize::new(0)), lost.clone());
        std::thread::spawn(move || {
            for near in listener.incoming() {
                let (near, count, cut) = (near.unwrap(), count.clone(), cut.clone());
                let Ok(far) = TcpStream::connect(("127.0.0.1", member)) else { continue };
                let (mut near_in, mut far_out) =
                    (near.try_clone().unwrap(), far.try_clone().unwrap());
                let (mut near_out, mut far_in) = (near, far);
                let (counted, cut_there) = (count.clone(), cut.clone());
                std::thread::spawn(move || {
                    let mut bytes = [0; 64 * 1024];
                    while let Ok(len @ 1..) = near_in.read(&mut bytes) {
                        // The request itself.
                        if counted.fetch_add(1, Ordering::Relaxed) % every == every - 1 {
                            cut_there.fetch_add(1, Ordering::Relaxed);
                            let _ = near_in.shutdown(Shutdown::Both);
                            break;
                        }
                        if far_out.write_all(&bytes[..len]).is_err() {
                            break;
                        }
                    }
                    let _ = far_out.shutdown(Shutdown::Both);
                });
                std::thread::spawn(move || {
                    let mut bytes = [0; 64 * 1024];
                    while let Ok(len @ 1..) = far_in.read(&mut bytes) {
                        let n = count.fetch_add(1, Ordering::Relaxed) % every;
                        if n == every - 1 {
                            cut.fetch_add(1, Ordering::Relaxed);
                            break;
                        }
                        // Later than the client waits: the member has it.
                        if n == every / 2 {
                            std::thread::sleep(Duration::from_millis(300));
                        }
                        if near_out.write_all(&bytes[..len]).is_err() {
                            break;
                        }
                    }
                    let _ = near_out.shutdown(Shutdown::Both);
                });
            }
        });
        Way { address, lost, _port: port }
    }
}

#[test]
fn the_store_of_etcd_conforms() {
    let etcd = Etcd::start("etcd-conforms", 1);
    let store = EtcdStore::open(etcd.config("a"), 1).unwrap();
    conforms(&store);
    // More than one page, and a key twice.
    for first in (0..1_200).step_by(100) {
        let keys = first..first + 100;
        store
            .commit(&keys.fold(Txn::default(), |txn, n| txn.put(format!("many/{n:04}"), vec![1])))
            .unwrap();
    }
    let many = store.list("many/").unwrap();
    assert_eq!((many.len(), many[1_199].0.as_str()), (1_200, "many/1199"));
    store.commit(&Txn::default().put("twice", vec![1]).put("twice", vec![2])).unwrap();
    assert_eq!(store.get("twice").unwrap().unwrap().value, [2]);
    // Another prefix is another store.
    let other = EtcdConfig { prefix: "/other/".into(), ..etcd.config("a") };
    let other = EtcdStore::open(other, 1).unwrap();
    assert_eq!(other.list("").unwrap().len(), 0);
    // Larger than etcd takes, which is not larger than a store may take.
    let large = Txn::default().put("large", vec![0; 2 * 1024 * 1024]);
    assert!(matches!(store.commit(&large), Err(StoreError::Refused(_))));
    store.commit(&Txn::default().put("large", vec![0; 1024])).unwrap();
}

#[test]
fn a_second_process_of_a_node_ends_the_first() {
    let etcd = Etcd::start("etcd-second", 1);
    let first = EtcdStore::open(etcd.config("a"), 1).unwrap();
    first.commit(&Txn::default().put("k", vec![1])).unwrap();
    let second = EtcdStore::open(etcd.config("a"), 2).unwrap();
    let refused = first.commit(&Txn::default().put("k", vec![2]));
    assert!(matches!(&refused, Err(StoreError::Taken(node)) if node == "a"));
    assert_eq!(second.get("k").unwrap().unwrap().value, [1]);
    second.commit(&Txn::default().put("k", vec![3])).unwrap();
    let other = EtcdStore::open(etcd.config("b"), 1).unwrap();
    other.commit(&Txn::default().put("k", vec![4])).unwrap();
    second.commit(&Txn::default().put("l", vec![5])).unwrap();
}

#[test]
fn what_was_lost_on_the_way_is_known_all_the_same() {
    let etcd = Etcd::start("etcd-lost", 1);
    let way = Way::to(etcd.ports[0][0].number(), 7);
    let config = EtcdConfig {
        endpoints: vec![way.address.clone()],
        attempt_max: Duration::from_millis(200),
        ..etcd.config("a")
    };
    let (store, straight) =
        (EtcdStore::open(config, 1).unwrap(), EtcdStore::open(etcd.config("b"), 1).unwrap());
    let mut seen = None;
    for n in 0u32..60 {
        let value = n.to_be_bytes().to_vec();
        let txn = Txn::default()
            .expect("last", seen)
            .put("last", value.clone())
            .put(format!("n/{n}"), value);
        seen = Some(store.commit(&txn).unwrap());
        // What it says is so at once, and stays so.
        let found = straight.get("last").unwrap();
        assert_eq!(found.as_ref().map(|found| found.revision), seen, "{n}");
    }
    assert_eq!(straight.list("n/").unwrap().len(), 60);
    // Requests were cut off, before and after etcd had them.
    assert!(way.lost.load(Ordering::Relaxed) > 10);
}

/// A member that stands still has what it was asked for, or has not: nobody knows, and later it is known.
#[test]
fn what_nobody_knows_is_settled_before_anything_else() {
    let etcd = Etcd::start("etcd-unknown", 1);
    let config = EtcdConfig {
        attempt_max: Duration::from_millis(100),
        total_max: Duration::from_millis(400),
        ..etcd.config("a")
    };
    let store = EtcdStore::open(config, 1).unwrap();
    let signal = |name: &str| {
        let pid = etcd.members[0].id().to_string();
        assert!(Command::new("kill").args([name, &pid]).status().unwrap().success());
    };
    for n in 0..5 {
        let seen = store.get("k").unwrap().map(|found| found.revision);
        signal("-STOP");
        let unknown = store.commit(&Txn::default().expect("k", seen).put("k", vec![n]));
        assert!(matches!(&unknown, Err(StoreError::Unknown(_))), "{unknown:?}");
        signal("-CONT");
        let deadline = Instant::now() + Duration::from_secs(20);
        while store.commit(&Txn::default().put("other", vec![n])).is_err() {
            assert!(Instant::now() < deadline, "etcd does not go on");
        }
        // It was carried out or never will be.
        let found = store.get("k").unwrap();
        std::thread::sleep(Duration::from_millis(200));
        assert_eq!(store.get("k").unwrap(), found);
    }
}

#[test]
fn a_member_that_is_lost_is_not_missed_and_a_majority_is() {
    let mut etcd = Etcd::start("etcd-member", 3);
    let store = EtcdStore::open(etcd.config("a"), 1).unwrap();
    for lost in 0..2 {
        store.commit(&Txn::default().put("k", vec![lost])).unwrap();
        etcd.members[usize::from(lost)].kill().unwrap();
        etcd.members[usize::from(lost)].wait().unwrap();
        if lost == 0 {
            store.commit(&Txn::default().put("k", vec![7])).unwrap();
        }
    }
    let short = EtcdConfig { total_max: Duration::from_secs(3), ..etcd.config("b") };
    assert!(EtcdStore::open(short, 1).is_err());
    let config = EtcdConfig { total_max: Duration::from_secs(3), ..etcd.config("a") };
    drop(store);
    assert!(matches!(EtcdStore::open(config.clone(), 2), Err(StoreError::Unreachable(_))));
    etcd.members[0] = etcd.spawn(0);
    let store =
        EtcdStore::open(EtcdConfig { total_max: Duration::from_secs(60), ..config }, 3).unwrap();
    assert_eq!(store.get("k").unwrap().unwrap().value, [1]);
}

#[test]
fn a_password_is_shown_and_asked_for_again() {
    let etcd = Etcd::start("etcd-login", 1);
    let endpoint = etcd.config("a").endpoints[0].clone();
    for (path, question) in [
        ("user/add", r#"{"name":"root","password":"secret"}"#),
        ("role/add", r#"{"name":"root"}"#),
        ("user/grant", r#"{"user":"root","role":"root"}"#),
        ("enable", "{}"),
    ] {
        ureq::post(format!("{endpoint}/v3/auth/{path}")).send(question).unwrap();
    }
    let login = |password: &str| Some(EtcdLogin { user: "root".into(), password: password.into() });
    let config = |password| EtcdConfig { login: login(password), ..etcd.config("a") };
    let refused = EtcdStore::open(etcd.config("a"), 1).unwrap_err();
    assert!(matches!(&refused, StoreError::Refused(_)), "{refused}");
    let refused = EtcdStore::open(config("wrong"), 1).unwrap_err();
    assert!(matches!(&refused, StoreError::Refused(_)), "{refused}");
    assert!(!format!("{refused:?} {:?}", config("wrong")).contains("wrong"));
    let store = EtcdStore::open(config("secret"), 1).unwrap();
    store.commit(&Txn::default().put("k", vec![1])).unwrap();
}

#[test]
fn both_sides_are_known_by_their_certificates() {
    let certificates = certify("etcd-certificates", &["member", "node"]);
    let etcd = Etcd::start_by("etcd-tls", 1, Some(certificates));
    let store = EtcdStore::open(etcd.config("a"), 1).unwrap();
    conforms(&store);
    let other = certify("etcd-other", &["node"]);
    let short = EtcdConfig { total_max: Duration::from_secs(1), ..etcd.config("b") };
    let with = |ca: &Dir, identity: Option<&Dir>| {
        let identity = identity.map(|Dir(dir)| (dir.join("node.crt"), dir.join("node.key")));
        let tls = Some(EtcdTls { ca: ca.0.join("ca.crt"), identity });
        EtcdStore::open(EtcdConfig { tls, ..short.clone() }, 1)
    };
    let own = etcd.certificates.as_ref().unwrap();
    // Nothing is shown, or what another authority has signed; or etcd shows what ours has not.
    for (ca, identity) in [(own, None), (own, Some(&other)), (&other, Some(own))] {
        let refused = with(ca, identity).unwrap_err();
        assert!(matches!(refused, StoreError::Unreachable(_)), "{refused}");
    }
    with(own, Some(own)).unwrap();
}
