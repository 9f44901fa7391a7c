//! The captured state of a session, and what differs between two of them.

use std::collections::{BTreeMap, BTreeSet};

use super::cursor::Cursor;
use super::facts::Facts;
use super::pin::Pin;
use super::temporary::Temporary;

/// Statements, locks and settings that one session may hold to be moved.
pub const ENTRIES_MAX: usize = 10_000;

/// State of a session outside any transaction, as its server's catalogs show it.
///
/// Two sessions with equal snapshots answer alike; that is what a move proves before it lets go of the old one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Settings that are not as the configuration of the session's server has them (`Facts::configured`), by
    /// name, as SHOW gives them.
    pub settings: BTreeMap<String, String>,
    /// What RESET finds where that is not what it finds in Holdfast's own connection to the same server: by the
    /// startup packet, and by what its role and database had at the login. None if it was not asked.
    pub beneath: Option<BTreeMap<String, String>>,
    /// Custom settings, of the names that were asked for; those never set are absent.
    pub custom: BTreeMap<String, String>,
    /// Bytes of memory that its settings take beyond those of the server's own, if that can be known.
    pub setting_bytes: Option<i64>,
    /// Something that may have set a custom setting whose name is not known. That it has not is proven by memory.
    pub may_have_unnamed: Option<Pin>,
    /// Libraries loaded by LOAD.
    pub libraries: BTreeSet<String>,
    /// `session_user`.
    pub session_user: String,
    /// `role`, `none` unless SET ROLE.
    pub role: String,
    pub prepared: BTreeMap<String, Prepared>,
    /// Cursors WITH HOLD.
    pub cursors: BTreeMap<String, Cursor>,
    pub temporary: Temporary,
    pub channels: BTreeSet<String>,
    /// Session-level advisory locks, and how many times each is held.
    pub locks: BTreeMap<AdvisoryLock, u32>,
    /// What `currval` gives, by the quoted name of the sequence with its schema.
    pub sequences: BTreeMap<String, i64>,
    /// What `lastval` gives.
    pub last_value: Option<i64>,
}

/// A named prepared statement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prepared {
    /// As `pg_prepared_statements.statement`: for SQL-level ones the whole query string of the PREPARE.
    pub text: String,
    pub from_sql: bool,
    /// The parameters' types: of PostgreSQL's own the OIDs, which are the same everywhere; of others the names with
    /// their schemas.
    pub types: Vec<String>,
}

/// The key and mode of an advisory lock, as `pg_locks` shows them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct AdvisoryLock {
    pub classid: u32,
    pub objid: u32,
    /// 1: one bigint key; 2: two int keys.
    pub objsubid: u16,
    pub shared: bool,
}

impl AdvisoryLock {
    /// The arguments that lock it, as SQL.
    pub fn arguments(&self) -> String {
        match self.objsubid {
            1 => {
                let key = (u64::from(self.classid) << 32 | u64::from(self.objid)).cast_signed();
                // The literal needs its quotes: `-9223372036854775808` alone is a numeric.
                format!("'{key}'::pg_catalog.int8")
            }
            _ => {
                let (first, second) = (self.classid.cast_signed(), self.objid.cast_signed());
                format!("'{first}'::pg_catalog.int4, '{second}'::pg_catalog.int4")
            }
        }
    }
}

impl Snapshot {
    /// How many entries there are in all.
    pub fn len(&self) -> usize {
        self.settings.len()
            + self.custom.len()
            + self.libraries.len()
            + self.prepared.len()
            + self.channels.len()
            + self.sequences.len()
            + self.cursors.len()
            + self.temporary.first.len()
            + self.temporary.then.len()
            + self
                .locks
                .values()
                .map(|count| usize::try_from(*count).unwrap_or(usize::MAX))
                .sum::<usize>()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The part that can be restored beforehand, see [`super::replay::Phase`].
    pub fn beforehand(&self) -> Snapshot {
        let prepared = &self.prepared;
        // What is prepared may be about temporary objects.
        let wait = !self.temporary.is_empty();
        let mut settings = self.settings.clone();
        // A copy may be idle for as long as it takes.
        settings.remove("idle_session_timeout");
        Snapshot {
            settings,
            prepared: if wait { BTreeMap::new() } else { prepared.clone() },
            cursors: BTreeMap::new(),
            temporary: Temporary::default(),
            channels: BTreeSet::new(),
            locks: BTreeMap::new(),
            sequences: BTreeMap::new(),
            last_value: None,
            ..self.clone()
        }
    }

    /// Forgets settings of a captured copy that are its server's own and that the session could not have
    /// changed: only a superuser may, and the session has what its own server gave it; or its own server, of another
    /// major, does not have them.
    pub fn without_settings_of_server(
        mut self,
        wanted: &Snapshot,
        here: &Facts,
        there: &Facts,
    ) -> Snapshot {
        self.settings.retain(|name, value| {
            let own = there.configured.get(name);
            wanted.settings.contains_key(name)
                || !own
                    .is_some_and(|own| (own.superuser || !here.knows(name)) && own.value == *value)
        });
        self
    }

    /// Everything in which `there` is not this session. Empty means identical.
    pub fn differences(&self, there: &Snapshot) -> Vec<Pin> {
        let mut pins = Vec::new();
        let mut differs = |what: String, here: Option<String>, there: Option<String>| {
            if here != there {
                let or_none = |value: Option<String>| value.unwrap_or_else(|| "(none)".into());
                pins.push(Pin::Differs { what, here: or_none(here), there: or_none(there) });
            }
        };
        differs(
            "session_user".into(),
            Some(self.session_user.clone()),
            Some(there.session_user.clone()),
        );
        differs("role".into(), Some(self.role.clone()), Some(there.role.clone()));
        both(&self.settings, &there.settings, |name, a, b| {
            differs(format!("setting {name}"), a.cloned(), b.cloned());
        });
        if let (Some(here), Some(there)) = (&self.beneath, &there.beneath) {
            both(here, there, |name, a, b| {
                differs(format!("the default of {name}"), a.cloned(), b.cloned());
            });
        }
        both(&self.custom, &there.custom, |name, a, b| {
            // Values of custom settings may be secrets, so they are not shown.
            let same = a == b;
            let shown = |present: bool| {
                Some(
                    if same {
                        "same"
                    } else if present {
                        "set"
                    } else {
                        "other"
                    }
                    .into(),
                )
            };
            if !same {
                differs(format!("setting {name}"), shown(true), shown(false));
            }
        });
        both(&self.prepared, &there.prepared, |name, a, b| {
            let shown = |p: Option<&Prepared>| {
                p.map(|p| {
                    format!("{} types {:?}", crate::sql::shown(p.text.as_bytes(), 60), p.types)
                })
            };
            if a != b {
                let (a, b) = (shown(a), shown(b));
                let b = if a == b { Some("another text".into()) } else { b };
                differs(format!("prepared statement {name}"), a, b);
            }
        });
        both(&self.cursors, &there.cursors, |name, a, b| {
            let shown = |c: Option<&Cursor>| {
                c.map(|c| if c.is_scrollable { "SCROLL" } else { "NO SCROLL" }.to_owned())
            };
            differs(format!("cursor {name}"), shown(a), shown(b));
        });
        self.temporary.differences(&there.temporary, &mut differs);
        let listed =
            |set: &BTreeSet<String>| Some(set.iter().cloned().collect::<Vec<_>>().join(","));
        differs("listened channels".into(), listed(&self.channels), listed(&there.channels));
        differs("libraries".into(), listed(&self.libraries), listed(&there.libraries));
        both(&self.locks, &there.locks, |lock, a, b| {
            let shown = |count: Option<&u32>| count.map(u32::to_string);
            differs(format!("advisory lock ({})", lock.arguments()), shown(a), shown(b));
        });
        both(&self.sequences, &there.sequences, |name, a, b| {
            differs(format!("currval of {name}"), a.map(i64::to_string), b.map(i64::to_string));
        });
        let shown = |value: Option<i64>| value.map(|value| value.to_string());
        differs("lastval".into(), shown(self.last_value), shown(there.last_value));
        match (self.setting_bytes, there.setting_bytes) {
            (Some(here), Some(there)) if here - there >= CUSTOM_SETTING_BYTES_MIN => {
                pins.push(Pin::UnnamedSettings { bytes: here - there });
            }
            (Some(_), Some(_)) => (),
            _ => pins.extend(self.may_have_unnamed.clone()),
        }
        pins
    }
}

/// A custom setting takes more memory than this for its description alone (`struct config_string`). Less is the
/// difference between a value that was set and one that is the same by default.
const CUSTOM_SETTING_BYTES_MIN: i64 = 200;

/// Calls `each` for every key of either map.
fn both<K: Ord + Clone, V>(
    a: &BTreeMap<K, V>,
    b: &BTreeMap<K, V>,
    mut each: impl FnMut(&K, Option<&V>, Option<&V>),
) {
    let keys: BTreeSet<&K> = a.keys().chain(b.keys()).collect();
    keys.into_iter().for_each(|key| each(key, a.get(key), b.get(key)));
}

#[cfg(test)]
mod tests {
    use super::super::facts::Configured;
    use super::*;

    #[test]
    fn lock_keys_are_read_back_with_their_sign() {
        let lock =
            |classid, objid, objsubid| AdvisoryLock { classid, objid, objsubid, shared: false };
        assert_eq!(lock(0, 42, 1).arguments(), "'42'::pg_catalog.int8");
        assert_eq!(lock(0x8000_0000, 0, 1).arguments(), "'-9223372036854775808'::pg_catalog.int8");
        let two = "'-1'::pg_catalog.int4, '7'::pg_catalog.int4";
        assert_eq!(lock(u32::MAX, 7, 2).arguments(), two);
    }

    #[test]
    fn equal_snapshots_do_not_differ_and_others_say_how() {
        let mut here =
            Snapshot { role: "none".into(), session_user: "app".into(), ..Snapshot::default() };
        here.settings.insert("work_mem".into(), "4MB".into());
        let mut there = here.clone();
        assert_eq!(here.differences(&there), []);
        there.settings.insert("work_mem".into(), "8MB".into());
        there.settings.insert("geqo".into(), "off".into());
        there.role = "reader".into();
        there.last_value = Some(7);
        let shown: Vec<String> = here.differences(&there).iter().map(Pin::to_string).collect();
        assert_eq!(
            shown,
            [
                "role is `none` here and `reader` on the other server",
                "setting geqo is `(none)` here and `off` on the other server",
                "setting work_mem is `4MB` here and `8MB` on the other server",
                "lastval is `(none)` here and `7` on the other server",
            ]
        );
    }

    #[test]
    fn what_only_the_server_decides_is_no_difference() {
        let configured = Configured { value: "on".into(), superuser: true };
        let there = Facts {
            configured: [("log_duration".to_owned(), configured)].into(),
            ..Facts::default()
        };
        let mut copy = Snapshot::default();
        copy.settings.insert("log_duration".into(), "on".into());
        let mut wanted = Snapshot::default();
        assert_eq!(copy.clone().without_settings_of_server(&wanted, &there, &there), wanted);
        wanted.settings.insert("log_duration".into(), "off".into());
        let found = copy.without_settings_of_server(&wanted, &there, &there);
        assert_eq!(wanted.differences(&found).len(), 1);
    }

    #[test]
    fn settings_without_a_name_show_by_their_memory() {
        let may = Pin::CustomSettings { statement: "SELECT set_config($1, $2, false)".into() };
        let mut here = Snapshot { setting_bytes: Some(500), ..Snapshot::default() };
        here.may_have_unnamed = Some(may.clone());
        let there = |bytes| Snapshot { setting_bytes: bytes, ..Snapshot::default() };
        assert_eq!(here.differences(&there(Some(460))), []);
        let unnamed = Pin::UnnamedSettings { bytes: 300 };
        assert_eq!(here.differences(&there(Some(200))), [unnamed]);
        assert_eq!(here.differences(&there(None)), [may]);
    }

    #[test]
    fn values_of_custom_settings_are_not_shown() {
        let mut here = Snapshot::default();
        here.custom.insert("app.token".into(), "sesame".into());
        let pins = here.differences(&Snapshot::default());
        assert_eq!(pins.len(), 1);
        assert!(!format!("{pins:?}").contains("sesame"));
    }
}
