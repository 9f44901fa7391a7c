//! One suite that every store passes, and what only a durable one must do.

#![allow(clippy::unwrap_used)]

mod etcd;

use std::path::PathBuf;

use store::embedded::EmbeddedStore;
use store::memory::MemoryStore;
use store::{Store, StoreError, Txn, VALUE_LEN_MAX};

struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Dir {
        let dir =
            std::env::temp_dir().join(format!("holdfast-store-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        Dir(dir)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn conforms(store: &dyn Store) {
    assert_eq!(store.get("app/a").unwrap(), None);
    let first =
        store.commit(&Txn::default().expect("app/a", None).put("app/a", b"1".to_vec())).unwrap();
    let seen = store.get("app/a").unwrap().unwrap();
    assert_eq!((seen.value.as_slice(), seen.revision), (&b"1"[..], first));

    // A condition that does not hold leaves everything as it was.
    let stale = Txn::default()
        .expect("app/a", None)
        .put("app/a", b"2".to_vec())
        .put("app/b", b"2".to_vec());
    assert!(
        matches!(store.commit(&stale), Err(StoreError::Conflict { found: Some(r), .. }) if r == first)
    );
    assert_eq!(store.get("app/b").unwrap(), None);

    let next = Txn::default()
        .expect("app/a", Some(first))
        .put("app/a", b"2".to_vec())
        .put("app/b", vec![0; 9]);
    let second = store.commit(&next).unwrap();
    assert!(second > first);
    assert!(store.commit(&next).is_err());

    let keys =
        |prefix| store.list(prefix).unwrap().into_iter().map(|(key, _)| key).collect::<Vec<_>>();
    assert_eq!(keys("app/"), ["app/a", "app/b"]);
    assert_eq!(keys("app/b"), ["app/b"]);
    assert_eq!(keys("app_"), Vec::<String>::new());
    assert_eq!(keys("%"), Vec::<String>::new());

    store.commit(&Txn::default().delete("app/a")).unwrap();
    assert_eq!(keys(""), ["app/b"]);
    let large = Txn::default().put("app/c", vec![0; VALUE_LEN_MAX + 1]);
    assert!(matches!(store.commit(&large), Err(StoreError::TooLarge { .. })));
}

#[test]
fn the_memory_store_conforms() {
    conforms(&MemoryStore::default());
}

#[test]
fn the_embedded_store_conforms() {
    let dir = Dir::new("conforms");
    conforms(&EmbeddedStore::open(&dir.0).unwrap());
}

#[test]
fn what_was_committed_is_there_after_opening_again() {
    let dir = Dir::new("durable");
    let revision = {
        let store = EmbeddedStore::open(&dir.0).unwrap();
        store.commit(&Txn::default().put("k", b"v".to_vec())).unwrap()
    };
    let store = EmbeddedStore::open(&dir.0).unwrap();
    assert_eq!(store.get("k").unwrap().unwrap().revision, revision);
    assert!(store.commit(&Txn::default().put("k", b"w".to_vec())).unwrap() > revision);
}

#[test]
fn a_second_owner_is_refused() {
    let dir = Dir::new("second");
    let _first = EmbeddedStore::open(&dir.0).unwrap();
    assert!(matches!(EmbeddedStore::open(&dir.0), Err(StoreError::InUse { .. })));
}

#[test]
fn a_log_cut_at_any_byte_opens_with_whole_transactions_only() {
    let dir = Dir::new("torn");
    {
        let store = EmbeddedStore::open(&dir.0).unwrap();
        for n in 0..5u8 {
            store.commit(&Txn::default().put("a", vec![n; 300]).put("b", vec![n; 300])).unwrap();
        }
        // A crash: the files as they are while the store is open.
        for name in ["store.db", "store.db-wal"] {
            std::fs::copy(dir.0.join(name), dir.0.join(format!("{name}.crash"))).unwrap();
        }
    }
    let wal = std::fs::read(dir.0.join("store.db-wal.crash")).unwrap();
    let torn = Dir::new("torn-copy");
    for cut in (0..wal.len()).step_by(97) {
        let _ = std::fs::remove_dir_all(&torn.0);
        std::fs::create_dir_all(&torn.0).unwrap();
        std::fs::copy(dir.0.join("store.db.crash"), torn.0.join("store.db")).unwrap();
        std::fs::write(torn.0.join("store.db-wal"), &wal[..cut]).unwrap();
        let store = EmbeddedStore::open(&torn.0).unwrap();
        let (a, b) = (store.get("a").unwrap(), store.get("b").unwrap());
        assert_eq!(a.map(|v| v.value), b.map(|v| v.value), "cut at {cut}");
    }
}

#[test]
fn a_copy_is_of_one_moment_and_replaces_the_store() {
    let (dir, copies) = (Dir::new("backed-up"), Dir::new("copies"));
    std::fs::create_dir_all(&copies.0).unwrap();
    let copy = copies.0.join("copy");
    let store = EmbeddedStore::open(&dir.0).unwrap();
    store.commit(&Txn::default().put("a", b"old".to_vec())).unwrap();
    EmbeddedStore::backup(&dir.0, &copy).unwrap();
    store.commit(&Txn::default().put("a", b"new".to_vec())).unwrap();
    assert!(matches!(EmbeddedStore::backup(&dir.0, &copy), Err(StoreError::File { .. })));
    assert!(matches!(EmbeddedStore::restore(&dir.0, &copy), Err(StoreError::InUse { .. })));
    drop(store);
    let half = copies.0.join("half");
    let bytes = std::fs::read(&copy).unwrap();
    for len in [0, 1, 100, bytes.len() / 2] {
        std::fs::write(&half, &bytes[..len]).unwrap();
        assert!(EmbeddedStore::restore(&dir.0, &half).is_err(), "{len}");
        let store = EmbeddedStore::open(&dir.0).unwrap();
        assert_eq!(store.get("a").unwrap().unwrap().value, b"new", "{len}");
    }
    let store = EmbeddedStore::restore(&dir.0, &copy).unwrap();
    assert_eq!(store.get("a").unwrap().unwrap().value, b"old");
    store.commit(&Txn::default().put("a", b"newer".to_vec())).unwrap();
}
