//! The store of one control node: a directory with a SQLite database, owned by one process.
//!
//! SQLite in WAL mode with `synchronous = FULL` returns from a commit when its log is on disk; a log that was
//! cut by a crash ends, by its checksums, before the first transaction that is not whole.

use std::fs::{File, TryLockError};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, OptionalExtension, params};

use crate::{Revision, Store, StoreError, Txn, Versioned, check_sizes};

/// How long a copy may wait for the process that writes.
const BACKUP_WAIT_MAX: Duration = Duration::from_secs(5);
/// The layout of the database; another one is refused.
const LAYOUT: i64 = 1;

#[derive(Debug)]
pub struct EmbeddedStore {
    connection: Mutex<Connection>,
    path: PathBuf,
    /// Held while the store is open.
    _lock: File,
}

impl EmbeddedStore {
    /// Opens the store in `dir`, which is made if it does not exist.
    ///
    /// # Errors
    /// Another process has it open, or it is damaged or of another layout.
    pub fn open(dir: &Path) -> Result<EmbeddedStore, StoreError> {
        let file = |what| move |source| StoreError::File { path: dir.to_owned(), what, source };
        std::fs::create_dir_all(dir).map_err(file("created"))?;
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700))
            .map_err(file("protected"))?;
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(dir.join("lock"))
            .map_err(file("locked"))?;
        match lock.try_lock() {
            Ok(()) => (),
            Err(TryLockError::WouldBlock) => {
                return Err(StoreError::InUse { path: dir.to_owned() });
            }
            Err(TryLockError::Error(source)) => return Err(file("locked")(source)),
        }
        let path = dir.join("store.db");
        let connection = Connection::open(&path)?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        let damaged = |problem: String| StoreError::Damaged { path: path.clone(), problem };
        let check: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
        if check != "ok" {
            return Err(damaged(check));
        }
        match connection.query_row("PRAGMA user_version", [], |row| row.get::<_, i64>(0))? {
            0 => connection.execute_batch(
                "BEGIN IMMEDIATE;
                 CREATE TABLE IF NOT EXISTS keys (
                     key TEXT PRIMARY KEY, value BLOB NOT NULL, revision INTEGER NOT NULL) WITHOUT ROWID;
                 CREATE TABLE IF NOT EXISTS revision (last INTEGER NOT NULL);
                 INSERT INTO revision SELECT 0 WHERE NOT EXISTS (SELECT * FROM revision);
                 PRAGMA user_version = 1;
                 COMMIT",
            )?,
            LAYOUT => (),
            other => return Err(damaged(format!("layout {other} where {LAYOUT} is known"))),
        }
        // The directory entries of new files are durable only once the directory is.
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(file("synced"))?;
        Ok(EmbeddedStore { connection: Mutex::new(connection), path, _lock: lock })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes a copy of the store in `dir` to a new file, as of one moment. The process that has it open goes on.
    ///
    /// # Errors
    /// There is no store, or the file is there already or cannot be written.
    pub fn backup(dir: &Path, to: &Path) -> Result<(), StoreError> {
        let file = |what| move |source| StoreError::File { path: to.to_owned(), what, source };
        // SQLite would write into an empty file that is there; nobody's file is to be lost.
        if to.exists() {
            return Err(file("written")(std::io::ErrorKind::AlreadyExists.into()));
        }
        let connection =
            Connection::open_with_flags(dir.join("store.db"), OpenFlags::SQLITE_OPEN_READ_ONLY)?;
        connection.busy_timeout(BACKUP_WAIT_MAX)?;
        connection.execute("VACUUM INTO ?1", [to.to_string_lossy()])?;
        let mode = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(to, mode).map_err(file("protected"))?;
        File::open(to).and_then(|copy| copy.sync_all()).map_err(file("synced"))
    }

    /// Puts a copy in the place of the store in `dir`, which nobody may have open, and opens it. What was there is kept
    /// beside it, as `store.db.before`.
    ///
    /// # Errors
    /// The store is in use, or the copy is damaged, of another layout, or no store. Then nothing is changed.
    pub fn restore(dir: &Path, from: &Path) -> Result<EmbeddedStore, StoreError> {
        let file = |what| move |source| StoreError::File { path: dir.to_owned(), what, source };
        let damaged = |problem: String| StoreError::Damaged { path: from.to_owned(), problem };
        // Its log is in the database once it is closed, and its lock is ours all the while.
        let EmbeddedStore { connection, path, _lock } = EmbeddedStore::open(dir)?;
        let connection = connection.into_inner().unwrap_or_else(PoisonError::into_inner);
        connection.pragma_update(None, "journal_mode", "DELETE")?;
        connection.close().map_err(|(_, error)| error)?;
        let new = dir.join("store.db.new");
        std::fs::copy(from, &new).map_err(file("copied"))?;
        {
            let copy = Connection::open_with_flags(&new, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
            let check: String = copy.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
            let layout: i64 = copy.query_row("PRAGMA user_version", [], |row| row.get(0))?;
            if check != "ok" || layout != LAYOUT {
                drop(copy);
                let _ = std::fs::remove_file(&new);
                return Err(damaged(format!("{check}, layout {layout} where {LAYOUT} is known")));
            }
        }
        File::open(&new).and_then(|copy| copy.sync_all()).map_err(file("synced"))?;
        std::fs::copy(&path, dir.join("store.db.before")).map_err(file("copied"))?;
        std::fs::rename(&new, &path).map_err(file("replaced"))?;
        drop(_lock);
        EmbeddedStore::open(dir)
    }
}

fn number(revision: Revision) -> i64 {
    i64::try_from(revision.0).unwrap_or(i64::MAX)
}

fn revision(number: i64) -> Revision {
    Revision(u64::try_from(number).unwrap_or(0))
}

impl Store for EmbeddedStore {
    fn get(&self, key: &str) -> Result<Option<Versioned>, StoreError> {
        let connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        let mut statement =
            connection.prepare_cached("SELECT value, revision FROM keys WHERE key = ?1")?;
        let found = statement.query_row([key], |row| {
            Ok(Versioned { value: row.get(0)?, revision: revision(row.get(1)?) })
        });
        Ok(found.optional()?)
    }

    fn list(&self, prefix: &str) -> Result<Vec<(String, Versioned)>, StoreError> {
        let connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        let sql = "SELECT key, value, revision FROM keys WHERE substr(key, 1, length(?1)) = ?1 ORDER BY key";
        let mut statement = connection.prepare_cached(sql)?;
        let rows = statement.query_map([prefix], |row| {
            Ok((row.get(0)?, Versioned { value: row.get(1)?, revision: revision(row.get(2)?) }))
        })?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    fn commit(&self, txn: &Txn) -> Result<Revision, StoreError> {
        check_sizes(txn)?;
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        let sqlite =
            connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        for (key, expected) in &txn.conditions {
            let found = sqlite
                .query_row("SELECT revision FROM keys WHERE key = ?1", [key], |row| row.get(0))
                .optional()?
                .map(revision);
            if found != *expected {
                return Err(StoreError::Conflict { key: key.clone(), expected: *expected, found });
            }
        }
        let next: i64 =
            sqlite.query_row("UPDATE revision SET last = last + 1 RETURNING last", [], |row| {
                row.get(0)
            })?;
        let next = revision(next);
        for (key, value) in &txn.writes {
            match value {
                Some(value) => sqlite.execute(
                    "INSERT INTO keys VALUES (?1, ?2, ?3)
                     ON CONFLICT (key) DO UPDATE SET value = excluded.value, revision = excluded.revision",
                    params![key, value, number(next)],
                )?,
                None => sqlite.execute("DELETE FROM keys WHERE key = ?1", [key])?,
            };
        }
        sqlite.commit()?;
        Ok(next)
    }
}
