//! What is the same for every session of a database, asked once by Holdfast's own connection, so that each
//! session need be asked only for what is its own.

use std::collections::{BTreeMap, BTreeSet};

use super::capture::{NOT_STATE, Row, Unreadable, optional, text};
use super::pin::Pin;
use super::snapshot::AdvisoryLock;

/// Sequences of one database that are looked through for values of a session. Each is locked meanwhile, by each
/// session that is read at the same time, in a table that by default has room for 6,400 locks in all.
const SEQUENCES_MAX: usize = 250;

/// A sequence's quoted name with its schema, and its bounds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequence {
    pub name: String,
    pub min: i64,
    pub max: i64,
}

/// A setting that a session may change, as the server's configuration has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Configured {
    pub value: String,
    /// Only a superuser may change it.
    pub superuser: bool,
}

/// What one backend holds that any connection can see.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OfBackend {
    pub locks: BTreeMap<AdvisoryLock, u32>,
    pub slots: Vec<String>,
    /// Bytes of its temporary files, where large cursors are.
    pub file_bytes: u64,
}

impl OfBackend {
    /// Reads a row of what the backend was asked of itself: a kind, and up to four columns.
    pub(super) fn read(&mut self, kind: &str, row: &Row) -> Result<(), Unreadable> {
        match kind {
            "lock" => self.read_lock(row),
            "slot" => {
                self.slots.push(text(row, 1)?.to_owned());
                Ok(())
            }
            _ => Err(Unreadable("known kind of row")),
        }
    }

    /// The key of a lock stands in columns 1 to 3, its mode in column 4.
    fn read_lock(&mut self, row: &Row) -> Result<(), Unreadable> {
        let number = |at, what| text(row, at)?.parse::<u32>().map_err(|_| Unreadable(what));
        let lock = AdvisoryLock {
            classid: number(1, "lock class")?,
            objid: number(2, "lock object")?,
            objsubid: text(row, 3)?.parse().map_err(|_| Unreadable("lock kind"))?,
            shared: text(row, 4)? == "ShareLock",
        };
        self.locks.insert(lock, 1);
        Ok(())
    }
}

/// What is known of a database and its server.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts {
    /// Settings that a session may change, as a session finds them that has none of its own.
    pub configured: BTreeMap<String, Configured>,
    /// What RESET finds in Holdfast's own connection, in base units, of settings that a session may change.
    pub resets: BTreeMap<String, String>,
    /// Settings that no session can change after its login.
    pub fixed: BTreeSet<String>,
    /// Custom settings that functions of this database set, or that databases and roles have: a session may have
    /// them without ever having said so.
    pub custom: BTreeSet<String>,
    /// What functions of this database may do to every session without leaving a trace.
    pub pins: Vec<Pin>,
    /// Replication origins exist, so a session may act for one.
    pub origins: bool,
    /// A function of this database calls `setval`, which gives `currval` a value and `lastval` none.
    pub setval: bool,
    /// Why values of sequences cannot be restored in this database.
    pub sequences_refused: Option<String>,
    /// Why nothing can be created in it without being noticed.
    pub creating_refused: Option<String>,
    /// By OID.
    pub sequences: BTreeMap<u32, Sequence>,
    /// Bytes of memory that the settings of Holdfast's own connection take there, from PostgreSQL 16.
    pub setting_bytes: Option<i64>,
    /// By process id. One that is not there had ended when it was looked for, and its locks with it.
    pub backends: BTreeMap<i32, OfBackend>,
}

/// What Holdfast's connection is asked, under `search_path = pg_catalog`.
///
/// - Settings are read as SHOW gives them, which is what a session is compared by. What the connection itself has
///   otherwise than the configuration is left out.
/// - A function's text is searched for names it sets; one that computes a name leaves no way to find it, and one
///   that sets the random seed leaves nothing that can be read.
pub const QUESTIONS: [&str; 3] = [
    "SELECT name, context, current_setting(name, true), \
     CASE WHEN source IN ('default','configuration file','command line','environment variable','override') \
     THEN 'configured' ELSE source END, reset_val FROM pg_settings",
    "WITH f AS MATERIALIZED (SELECT proname::text AS name, CASE WHEN prosqlbody IS NULL THEN prosrc \
     ELSE pg_get_function_sqlbody(oid) END AS body, proconfig FROM pg_proc WHERE oid >= 16384) \
     SELECT 'custom', m[1], NULL, NULL FROM f, \
     regexp_matches(body, $$\\mset_config\\s*\\(\\s*'([^'.]+\\.[^']+)'$$, 'gi') m UNION \
     SELECT 'custom', coalesce(m[1], m[2]), NULL, NULL FROM f, regexp_matches(body, \
     $$\\mset\\s+(?:local\\s+|session\\s+)?([a-z_\"]\\w*[\\w.\"]*\\.[\\w.\"]+)\\s*(?:=|to\\M)|\\mreset\\s+([a-z_\"]\\w*[\\w.\"]*\\.[\\w.\"]+)$$, \
     'gi') m UNION \
     SELECT 'custom', split_part(c, '=', 1), NULL, NULL FROM pg_db_role_setting, unnest(setconfig) c \
     WHERE c ~ '^[^=]*[.]' UNION \
     SELECT 'custom', split_part(c, '=', 1), NULL, NULL FROM f, unnest(proconfig) c WHERE c ~ '^[^=]*[.]' UNION ALL \
     SELECT 'computes', 'function ' || name, NULL, NULL FROM f \
     WHERE regexp_count(body, $$\\mset_config\\s*\\($$, 1, 'i') <> regexp_count(body, \
     $$\\mset_config\\s*\\(\\s*'[^']+'\\s*(::\\s*\\w+\\s*)?,$$, 1, 'i') \
     OR body ~* $$'\\s*set\\s+(?:local\\s+|session\\s+)?(?:[\\w\"]+\\s*\\.\\s*)*[%'|]$$ UNION ALL \
     SELECT 'computes', 'rule of ' || ev_class::regclass, NULL, NULL FROM pg_rewrite \
     WHERE ev_class >= 16384 AND ev_action::text LIKE '%:funcid 2078 %' UNION ALL \
     SELECT 'computes', 'default of ' || adrelid::regclass, NULL, NULL FROM pg_attrdef \
     WHERE adbin::text LIKE '%:funcid 2078 %' UNION ALL \
     SELECT 'computes', 'policy of ' || polrelid::regclass, NULL, NULL FROM pg_policy \
     WHERE concat(polqual::text, polwithcheck::text) LIKE '%:funcid 2078 %' UNION ALL \
     SELECT 'load', name, NULL, NULL FROM f WHERE body ~* \
     $$(^|;|\\mbegin|\\mthen|\\melse|\\mloop)\\s*load\\s+'|(execute|format)\\s*\\(?\\s*'load\\s+['%]$$ UNION ALL \
     SELECT 'seed', name, NULL, NULL FROM f \
     WHERE body ~* $$(\\msetseed\\s*\\(|\\mset\\s+(session\\s+|local\\s+)?seed\\M)$$ UNION ALL \
     SELECT 'setval', NULL, NULL, NULL WHERE EXISTS (SELECT FROM f WHERE body ~* $$\\msetval\\M$$) UNION ALL \
     SELECT 'language', lanname::text, NULL, NULL FROM pg_language l \
     WHERE lanname IN ('plperl','plperlu','plpython3u','pltcl','pltclu','plv8','plr','pllua') \
     AND EXISTS (SELECT FROM pg_proc WHERE prolang = l.oid) UNION ALL \
     SELECT 'origins', NULL, NULL, NULL WHERE EXISTS (SELECT FROM pg_replication_origin) UNION ALL \
     SELECT 'refuses', format('event trigger `%s` would run', evtname), NULL, NULL FROM pg_event_trigger \
     WHERE evtenabled <> 'D' AND evtevent IN ('ddl_command_start','ddl_command_end') \
     AND (evttags IS NULL OR 'ALTER SEQUENCE' = ANY (evttags)) UNION ALL \
     SELECT 'notices', format('event trigger `%s` would run', evtname), NULL, NULL FROM pg_event_trigger \
     WHERE evtenabled <> 'D' AND evtevent IN ('ddl_command_start','ddl_command_end','sql_drop') UNION ALL \
     SELECT 'refuses', format('prepared transaction `%s` may hold a sequence', gid), NULL, NULL \
     FROM pg_prepared_xacts WHERE database = current_database() UNION ALL \
     SELECT format('%I.%I', nspname, relname), c.oid::text, seqmin::text, seqmax::text FROM pg_sequence s \
     JOIN pg_class c ON c.oid = seqrelid JOIN pg_namespace n ON n.oid = relnamespace WHERE relpersistence <> 't'",
    "SELECT substring(name FROM '^pgsql_tmp([0-9]+)[.]'), sum(size)::text, NULL, NULL, 'files' FROM pg_ls_tmpdir() \
     WHERE name ~ '^pgsql_tmp[0-9]+[.]' GROUP BY 1 UNION ALL \
     SELECT used_bytes::text, NULL, NULL, NULL, 'settings' FROM pg_backend_memory_contexts \
     WHERE name = 'GUCMemoryContext' UNION ALL \
     SELECT pid::text, classid::text, objid::text, objsubid::text, mode FROM pg_locks \
     WHERE locktype = 'advisory' AND granted AND pid IS NOT NULL \
     AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) UNION ALL \
     SELECT active_pid::text, slot_name::text, NULL, NULL, 'slot' FROM pg_replication_slots \
     WHERE temporary AND active_pid IS NOT NULL UNION ALL \
     SELECT pid::text, NULL, NULL, NULL, 'alive' FROM pg_stat_activity \
     WHERE backend_type = 'client backend' AND datname = current_database()",
];

impl Facts {
    /// Reads the answer to the first of [`QUESTIONS`] alone.
    ///
    /// # Errors
    /// As [`Facts::read`].
    pub fn of_settings(rows: &[Row]) -> Result<Facts, Unreadable> {
        Facts::read(&[rows.to_vec(), Vec::new(), Vec::new()])
    }

    /// Reads the answers to [`QUESTIONS`].
    ///
    /// # Errors
    /// A column is missing or is not what was asked for.
    pub fn read(answers: &[Vec<Row>]) -> Result<Facts, Unreadable> {
        let mut facts = Facts::default();
        let rows = |at: usize| answers.get(at).ok_or(Unreadable("facts"));
        for row in rows(0)? {
            facts.read_setting(row)?;
        }
        for row in rows(1)? {
            facts.read_fact(row)?;
        }
        if facts.has_too_many_sequences() {
            let count = facts.sequences.len();
            let why = format!(
                "the database has {count} sequences, at most {SEQUENCES_MAX} are looked through"
            );
            facts.sequences_refused.get_or_insert(why);
        }
        for row in rows(2)? {
            facts.read_backend(row)?;
        }
        Ok(facts)
    }

    /// The server has this setting.
    pub fn knows(&self, setting: &str) -> bool {
        self.resets.contains_key(setting)
            || self.fixed.contains(setting)
            || self.configured.contains_key(setting)
    }

    /// There are more than are looked through.
    pub fn has_too_many_sequences(&self) -> bool {
        self.sequences.len() > SEQUENCES_MAX
    }

    fn read_setting(&mut self, row: &Row) -> Result<(), Unreadable> {
        let (name, context) = (text(row, 0)?.to_owned(), text(row, 1)?);
        let of_session = matches!(context, "user" | "superuser");
        if !of_session || NOT_STATE.contains(&name.as_str()) {
            self.fixed.insert(name);
            return Ok(());
        }
        let reset = optional(row, 4).unwrap_or_default().to_owned();
        self.resets.insert(name.clone(), reset);
        if text(row, 3)? == "configured" {
            let value = optional(row, 2).unwrap_or_default().to_owned();
            let superuser = context == "superuser";
            self.configured.insert(name, Configured { value, superuser });
        }
        Ok(())
    }

    fn read_fact(&mut self, row: &Row) -> Result<(), Unreadable> {
        match text(row, 0)? {
            "custom" => drop(self.custom.insert(text(row, 1)?.replace('"', ""))),
            "computes" => {
                self.pins.push(Pin::CustomSettings { statement: text(row, 1)?.to_owned() });
            }
            "load" => {
                let name = format!("in function {}", text(row, 1)?);
                self.pins.push(Pin::Library { name });
            }
            "seed" => {
                let statement = format!("function {}", text(row, 1)?);
                self.pins.push(Pin::Seed { statement });
            }
            "setval" => self.setval = true,
            "language" => {
                self.pins.push(Pin::StatefulLanguage { language: text(row, 1)?.to_owned() });
            }
            "origins" => self.origins = true,
            // Restoring a value takes an ALTER SEQUENCE that is rolled back.
            "notices" => {
                let why = text(row, 1)?.to_owned();
                self.creating_refused.get_or_insert(why);
            }
            "refuses" => {
                let why = text(row, 1)?.to_owned();
                self.sequences_refused.get_or_insert(why);
            }
            // The name of a sequence holds a dot, so it is none of the words above.
            name if name.contains('.') => {
                let number = |at| text(row, at)?.parse::<i64>().map_err(|_| Unreadable("number"));
                let oid = u32::try_from(number(1)?).map_err(|_| Unreadable("sequence"))?;
                let (min, max) = (number(2)?, number(3)?);
                self.sequences.insert(oid, Sequence { name: name.to_owned(), min, max });
            }
            _ => return Err(Unreadable("known kind of fact")),
        }
        Ok(())
    }

    fn read_backend(&mut self, row: &Row) -> Result<(), Unreadable> {
        if text(row, 4)? == "settings" {
            self.setting_bytes = text(row, 0)?.parse().ok();
            return Ok(());
        }
        let pid: i32 = text(row, 0)?.parse().map_err(|_| Unreadable("process id"))?;
        let backend = self.backends.entry(pid).or_default();
        match text(row, 4)? {
            "alive" => Ok(()),
            "files" => {
                backend.file_bytes = text(row, 1)?.parse().unwrap_or(u64::MAX);
                Ok(())
            }
            "slot" => {
                backend.slots.push(text(row, 1)?.to_owned());
                Ok(())
            }
            _ => backend.read_lock(row),
        }
    }

    /// Whether a session that was read by `other` would have been asked and told the same by these: everything but
    /// what backends hold at the moment.
    pub fn asks_the_same(&self, other: &Facts) -> bool {
        let Facts {
            configured,
            resets,
            fixed,
            custom,
            pins,
            origins,
            setval,
            sequences_refused,
            creating_refused,
            sequences: _,
            setting_bytes: _,
            backends: _,
        } = self;
        *configured == other.configured
            && *resets == other.resets
            && *fixed == other.fixed
            && *custom == other.custom
            && *pins == other.pins
            && *origins == other.origins
            && *setval == other.setval
            && *sequences_refused == other.sequences_refused
            && *creating_refused == other.creating_refused
    }

    /// What RESET finds of what this server's configuration gives otherwise than that of `there`, and anybody may set.
    pub fn given_otherwise(&self, there: &Facts) -> Vec<(String, String)> {
        let differs = |(name, here): (&String, &Configured)| {
            let other = there.configured.get(name)?;
            let may_be_given = !here.superuser && !other.superuser && other.value != here.value;
            let reset = self.resets.get(name).filter(|_| may_be_given)?;
            Some((name.clone(), reset.clone()))
        };
        self.configured.iter().filter_map(differs).collect()
    }

    /// Settings that sessions may change and that the two servers' configurations give otherwise, as
    /// `name (here, there)`. A session keeps the value it has; RESET finds the other.
    pub fn configured_otherwise(&self, there: &Facts) -> Vec<String> {
        let differs = |(name, here): (&String, &Configured)| {
            let other = &there.configured.get(name)?.value;
            (*other != here.value).then(|| format!("{name} (`{}`, `{other}`)", here.value))
        };
        self.configured.iter().filter_map(differs).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(cells: &[&str]) -> Row {
        cells.iter().map(|cell| (!cell.is_empty()).then(|| (*cell).to_owned())).collect()
    }

    fn facts(settings: &[Row], rows: &[Row]) -> Facts {
        Facts::read(&[settings.to_vec(), rows.to_vec(), Vec::new()]).unwrap()
    }

    #[test]
    fn settings_are_told_apart_by_who_may_change_them() {
        let facts = facts(
            &[
                row(&["work_mem", "user", "4MB", "configured"]),
                row(&["log_duration", "superuser", "off", "configured"]),
                row(&["port", "postmaster", "5432", "configured"]),
                row(&["search_path", "user", "pg_catalog", "client"]),
            ],
            &[],
        );
        let names: Vec<&String> = facts.configured.keys().collect();
        assert_eq!(names, ["log_duration", "work_mem"]);
        assert!(facts.configured["log_duration"].superuser);
        assert!(facts.fixed.contains("port"));
    }

    #[test]
    fn what_hides_in_functions_pins_every_session() {
        let rows = [
            row(&["custom", "app.x"]),
            row(&["computes", "function f"]),
            row(&["seed", "g"]),
            row(&["language", "plperl"]),
            row(&["refuses", "event trigger `audit` would run"]),
            row(&["public.s", "40", "1", "100"]),
        ];
        let facts = facts(&[], &rows);
        let codes: Vec<&str> = facts.pins.iter().map(Pin::code).collect();
        assert_eq!(codes, ["custom_settings", "seed", "stateful_language"]);
        assert_eq!(facts.sequences_refused.as_deref(), Some("event trigger `audit` would run"));
        assert_eq!(facts.sequences[&40].name, "public.s");
    }

    #[test]
    fn locks_and_slots_are_kept_by_backend() {
        let rows = [
            row(&["7", "0", "42", "1", "ExclusiveLock"]),
            row(&["8", "s", "", "", "slot"]),
            row(&["7", "0", "42", "1", "ShareLock"]),
            row(&["9", "", "", "", "alive"]),
        ];
        let facts = Facts::read(&[vec![], vec![], rows.to_vec()]).unwrap();
        assert_eq!(facts.backends[&7].locks.len(), 2);
        assert_eq!(facts.backends[&8].slots, ["s"]);
        assert_eq!(facts.backends[&9], OfBackend::default());
        assert!(Facts::read(&[vec![], vec![row(&["surprise"])], vec![]]).is_err());
    }

    #[test]
    fn what_backends_hold_does_not_change_what_is_asked() {
        let here = facts(&[row(&["work_mem", "user", "4MB", "configured"])], &[]);
        let mut later = here.clone();
        later.backends.insert(7, OfBackend::default());
        assert!(here.asks_the_same(&later));
        later.custom.insert("app.x".into());
        assert!(!here.asks_the_same(&later));
    }

    #[test]
    fn differing_configurations_are_named() {
        let here = facts(&[row(&["work_mem", "user", "4MB", "configured"])], &[]);
        let there = facts(&[row(&["work_mem", "user", "8MB", "configured"])], &[]);
        assert_eq!(here.configured_otherwise(&there), ["work_mem (`4MB`, `8MB`)"]);
        assert!(here.configured_otherwise(&here).is_empty());
    }
}
