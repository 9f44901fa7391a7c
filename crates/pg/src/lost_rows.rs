//! Rows that only a lost server has: which, its log says; what they hold, the server itself does, in single-user mode (manual,
//! "postgres", "Options for Single-User Mode").
//!
//! That recovers it, and so ends its timeline as a rewind would have it ended, which is what follows. Nothing is called that is
//! somebody else's: rows are read by their places, past row security, as the first superuser.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Seek};
use std::path::{Path, PathBuf};
use std::time::Duration;

use model::Lsn;
use model::lost::{LostRows, LostTable, TABLES_MAX, Tail};

use crate::instance::{Instance, InstanceError, Limit, STALL_MAX};
use crate::touched::{Changes, File, Touched};
use crate::wal::{create_kept, files_from, make_kept_dir, segments, write_kept};

/// Before the tail, log is read for what transactions had done that committed in it.
const BEFORE_MAX: u64 = 64 << 20;
const READ_MAX: Duration = Duration::from_secs(300);
/// Databases that are looked at, each by a start of the server.
const DATABASES_MAX: usize = 32;
/// What a database says of its tables.
const SAID_MAX: u64 = 16 << 20;
const SAID: &str = "said";

/// Has the rows of a tail written to files in `dir`, where its log is kept. The server has ended, and may be a primary; `made`
/// is a place for what it writes.
///
/// # Errors
/// In words: nothing is known of them.
pub(crate) async fn keep(
    instance: &Instance,
    tail: &Tail,
    (made, dir): (&Path, &Path),
) -> Result<LostRows, String> {
    let made = Made::at(instance, made)?;
    let touched = match read_log(instance, tail, begin_before(instance, tail)).await {
        Ok(touched) => touched,
        // What is before may be of a timeline that is not there any more.
        Err(_) => read_log(instance, tail, tail.from).await?,
    };
    let mut rows =
        LostRows { beyond: touched.lost_beyond, cut: touched.cut, ..LostRows::default() };
    let mut of_databases: BTreeMap<u32, Vec<(File, Changes)>> = BTreeMap::new();
    for (file, changes) in touched.changes() {
        of_databases.entry(file.database).or_default().push((file, changes));
    }
    if of_databases.keys().all(|database| *database == 0) {
        rows.catalogs +=
            of_databases.into_values().flatten().map(|(_, one)| one.count()).sum::<u64>();
        return Ok(rows);
    }
    let committed: Vec<String> = touched.committed.iter().map(u32::to_string).collect();
    let committed = committed.join(",");
    let names = databases(instance, &made).await?;
    let mut deleted = String::new();
    for (count, (database, mut tables)) in of_databases.into_iter().enumerate() {
        // Catalogs that all databases share.
        if database == 0 {
            rows.catalogs += tables.iter().map(|(_, changes)| changes.count()).sum::<u64>();
            continue;
        }
        tables.sort_by_key(|(_, changes)| std::cmp::Reverse(changes.count()));
        let said = match names.get(&database) {
            Some(_) if count >= DATABASES_MAX => {
                Err(format!("no more than {DATABASES_MAX} databases are looked at"))
            }
            Some(name) => read_tables(instance, &made, name, (&tables, &committed)).await,
            None => Err("its database is gone, or has a name that cannot be given".to_owned()),
        };
        let name = names.get(&database).cloned().unwrap_or_else(|| database.to_string());
        for (number, (file, changes)) in tables.iter().enumerate() {
            let found = said.as_ref().map(|said| said.get(&number));
            match found {
                Ok(Some(Said { kind: Kind::Catalog, .. })) => {
                    rows.catalogs += changes.count();
                    continue;
                }
                Ok(Some(Said { kind: Kind::Part, .. })) => continue,
                Ok(Some(Said { name: Some(table), .. })) => {
                    deleted.push_str(&asks_for_deleted(&name, table, changes));
                }
                _ => (),
            }
            let kept = format!("rows-{}.csv", rows.tables.len() + 1);
            let table = table_of(&name, file, (changes, &kept), found);
            if table.rows.is_some() {
                made.take(instance, &file_of(number), &dir.join(&kept))?;
            }
            rows.tables.push(table);
        }
    }
    rows.tables.sort_by_key(|one| std::cmp::Reverse(one.inserted + one.updated + one.deleted));
    let mut text = rows.says() + "\n";
    rows.tables.iter().for_each(|table| text.extend([table.says(), "\n".into()]));
    let write = |name: &str, text: &str| {
        let path = dir.join(name);
        write_kept(&path, text).map_err(|error| format!("`{}`: {error}", path.display()))
    };
    write("rows.txt", &text)?;
    if !deleted.is_empty() {
        write("deleted.sql", &deleted)?;
    }
    rows.tables.truncate(TABLES_MAX);
    Ok(rows)
}

/// Where what the server writes stands until it is kept; it goes in the end.
struct Made(PathBuf);

impl Made {
    fn at(instance: &Instance, path: &Path) -> Result<Made, String> {
        let io = |error: std::io::Error| format!("`{}`: {error}", path.display());
        match std::fs::remove_dir_all(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(io(error)),
            _ => (),
        }
        make_kept_dir(path).map_err(io)?;
        let made = Made(path.to_owned());
        instance.own_dir(path).map_err(chain)?;
        Ok(made)
    }

    /// As it can stand in SQL of ours.
    fn literal(&self, name: &str) -> Result<String, String> {
        let path = self.0.join(name);
        let text = path.to_str().filter(|text| !text.contains(['\'', '\\', '\n', '$']));
        let text =
            text.ok_or("the name of its directory has letters that a command cannot have")?;
        Ok(format!("'{text}'"))
    }

    /// Reads what the server has written, and removes it.
    fn said(&self, instance: &Instance) -> Result<String, String> {
        let path = self.0.join(SAID);
        let file = instance.open_own(&path).map_err(chain)?;
        let io = |error: std::io::Error| format!("`{}`: {error}", path.display());
        let mut bytes = Vec::new();
        file.take(SAID_MAX).read_to_end(&mut bytes).map_err(io)?;
        std::fs::remove_file(&path).map_err(io)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn take(&self, instance: &Instance, name: &str, to: &Path) -> Result<(), String> {
        let mut from = instance.open_own(&self.0.join(name)).map_err(chain)?;
        let io = |error: std::io::Error| format!("`{}`: {error}", to.display());
        let mut kept = create_kept(to).map_err(io)?;
        std::io::copy(&mut from, &mut kept).map_err(io)?;
        kept.sync_all().map_err(io)
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn chain(error: InstanceError) -> String {
    model::chain(&error)
}

/// The oldest log of its timeline that is there, but not too far back.
fn begin_before(instance: &Instance, tail: &Tail) -> Lsn {
    let far = Lsn(tail.from.0.saturating_sub(BEFORE_MAX));
    let all = segments(&instance.data_dir).unwrap_or_default();
    let begins = all.iter().filter(|one| one.timeline == tail.timeline).map(|one| one.begin);
    begins.filter(|begin| *begin >= far).min().map_or(tail.from, |begin| begin.min(tail.from))
}

async fn read_log(instance: &Instance, tail: &Tail, from: Lsn) -> Result<Touched, String> {
    let dir = instance.data_dir.join("pg_wal");
    let ([first, last], end) = files_from(&instance.data_dir, tail.timeline, from)
        .ok_or_else(|| format!("no file of timeline {} has {from}", tail.timeline))?;
    let start = from.to_string();
    let args = [
        "-p",
        dir.to_str().unwrap_or_default(),
        "-s",
        &start,
        "-e",
        &end,
        "--rmgr=Heap",
        "--rmgr=Heap2",
        "--rmgr=Transaction",
        "--rmgr=Standby",
        &first,
        &last,
    ];
    let ran = instance.run_into_file("pg_waldump", &args, None, Limit::Whole(READ_MAX)).await;
    let (_, mut output) = ran.map_err(chain)?;
    let io = |error: std::io::Error| format!("what pg_waldump says cannot be read: {error}");
    output.rewind().map_err(io)?;
    let (mut touched, mut has_read) = (Touched::since(tail.from), false);
    for line in BufReader::new(output).split(b'\n') {
        let line = line.map_err(io)?;
        let line = String::from_utf8_lossy(&line);
        has_read |= line.starts_with("rmgr: ");
        touched.read(&line);
    }
    match has_read {
        true => Ok(touched),
        false => Err("nothing of its log can be read".into()),
    }
}

/// Runs commands, each on a line of its own, in a database of a server that has ended.
async fn ask(instance: &Instance, database: &str, line: &str) -> Result<(), String> {
    let args = [
        "--single",
        "-D",
        instance.data_dir.to_str().unwrap_or_default(),
        "-c",
        "search_path=pg_catalog",
        "-c",
        "default_transaction_read_only=on",
        "-c",
        "log_statement=none",
        database,
    ];
    let input = format!("{line}\n");
    let limit = Limit::Still(STALL_MAX);
    let ran = instance.run_into_file("postgres", &args, Some(input.as_bytes()), limit).await;
    let (status, mut output) = ran.map_err(chain)?;
    let mut bytes = Vec::new();
    let _ = output.rewind().and_then(|()| output.take(SAID_MAX).read_to_end(&mut bytes));
    let text = String::from_utf8_lossy(&bytes);
    // A command that fails ends nothing.
    let wrong =
        text.lines().find_map(|line| line.split_once("ERROR: ").map(|(_, said)| said.trim()));
    match wrong.or_else(|| text.lines().last().filter(|_| !status.success())) {
        Some(said) => Err(format!("`postgres --single`, which ended with {status}: {said}")),
        None => Ok(()),
    }
}

/// Numbers and names of databases. What has a name that cannot be an argument is left out.
async fn databases(instance: &Instance, made: &Made) -> Result<BTreeMap<u32, String>, String> {
    let to = made.literal(SAID)?;
    let line = format!("COPY (SELECT oid, datname FROM pg_database) TO {to}");
    ask(instance, "template1", &line).await?;
    let said = made.said(instance)?;
    let pairs = said.lines().filter_map(|line| line.split_once('\t'));
    let named = pairs.filter(|(_, name)| !name.starts_with('-') && !name.contains('\\'));
    Ok(named.filter_map(|(number, name)| Some((number.parse().ok()?, name.to_owned()))).collect())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Of rows that people have written.
    Table,
    Catalog,
    /// Long values of another's rows, which are read with them.
    Part,
}

/// What a database says of a table.
#[derive(Debug, PartialEq, Eq)]
struct Said {
    kind: Kind,
    /// With its schema, quoted. None if it is gone.
    name: Option<String>,
    rows: Result<u64, String>,
}

fn read_said(line: &str) -> Option<(usize, Said)> {
    let mut fields = line.split('\t').map(|field| Some(field).filter(|field| *field != "\\N"));
    let number = fields.next()??.parse().ok()?;
    let kind = match fields.next()?? {
        "catalog" => Kind::Catalog,
        "part" => Kind::Part,
        _ => Kind::Table,
    };
    let name = fields.next()?.map(str::to_owned);
    let rows = fields.next()?.and_then(|count| count.parse().ok());
    let why = fields.next()?.unwrap_or("it is gone");
    Some((number, Said { kind, name, rows: rows.ok_or_else(|| why.to_owned()) }))
}

fn file_of(number: usize) -> String {
    format!("{number}.csv")
}

async fn read_tables(
    instance: &Instance,
    made: &Made,
    database: &str,
    (tables, committed): (&[(File, Changes)], &str),
) -> Result<BTreeMap<usize, Said>, String> {
    let line = asks_for_rows(made, tables, committed)?;
    ask(instance, database, &line).await?;
    Ok(made.said(instance)?.lines().filter_map(read_said).collect())
}

/// One command that writes the rows of each table to a file, and what became of that to another. In it is nothing but numbers
/// and paths of ours; names are the server's own, quoted by it.
fn asks_for_rows(
    made: &Made,
    tables: &[(File, Changes)],
    committed: &str,
) -> Result<String, String> {
    let mut values = Vec::with_capacity(tables.len());
    for (number, (File { tablespace, node, .. }, changes)) in tables.iter().enumerate() {
        let to = made.literal(&file_of(number))?;
        let places = places(&changes.written);
        values.push(format!("({number}, {tablespace}::oid, {node}::oid, '{places}', {to})"));
    }
    Ok(format!(
        "DO $h$ DECLARE r record; n bigint; why text; numbers int[]; kinds text[]; names text[]; counts bigint[]; whys text[]; BEGIN \
        FOR r IN SELECT v.*, c.oid AS rel, pg_catalog.quote_ident(s.nspname) || '.' || pg_catalog.quote_ident(c.relname) AS name, \
        CASE WHEN s.nspname = 'pg_catalog' THEN 'catalog' WHEN c.relkind NOT IN ('r', 'm') THEN 'part' ELSE 'table' END AS kind \
        FROM (VALUES {}) AS v (number, space, node, places, file) \
        LEFT JOIN pg_catalog.pg_class c ON c.oid = pg_catalog.pg_filenode_relation(v.space, v.node) \
        LEFT JOIN pg_catalog.pg_namespace s ON s.oid = c.relnamespace LOOP \
        n := NULL; why := NULL; \
        IF r.kind = 'table' AND r.rel IS NOT NULL THEN BEGIN \
        EXECUTE pg_catalog.format('COPY (SELECT t.* FROM ONLY %s AS t WHERE t.ctid = ANY (%L::pg_catalog.tid[]) \
        AND t.xmin::pg_catalog.text = ANY (%L::pg_catalog.text[])) TO %L WITH (FORMAT csv, HEADER)', \
        r.name, r.places, '{{{committed}}}', r.file); \
        GET DIAGNOSTICS n = ROW_COUNT; \
        EXCEPTION WHEN OTHERS THEN why := SQLERRM; END; END IF; \
        numbers := numbers || r.number; whys := whys || why; counts := counts || n; \
        names := names || CASE WHEN r.rel IS NOT NULL THEN r.name END; \
        kinds := kinds || r.kind; \
        END LOOP; \
        EXECUTE pg_catalog.format('COPY (SELECT * FROM ROWS FROM (unnest(%L::int[]), unnest(%L::text[]), unnest(%L::text[]), \
        unnest(%L::bigint[]), unnest(%L::text[]))) TO %L', numbers, kinds, names, counts, whys, {}); END $h$",
        values.join(", "),
        made.literal(SAID)?
    ))
}

fn places(all: &BTreeSet<(u32, u64)>) -> String {
    let all: Vec<String> =
        all.iter().map(|(block, line)| format!("\"({block},{line})\"")).collect();
    format!("{{{}}}", all.join(","))
}

/// For people to run on the active server, where a row that the lost one had deleted stands still, unless it was changed.
fn asks_for_deleted(database: &str, table: &str, changes: &Changes) -> String {
    if changes.gone.is_empty() {
        return String::new();
    }
    // As COPY has escaped it, or as it would be told to a terminal.
    if table.contains(|c: char| c == '\\' || c.is_control()) {
        return format!(
            "-- Rows of database {} were deleted in a table whose name cannot stand here: {}\n",
            database.escape_default(),
            table.escape_default()
        );
    }
    let gone = places(&changes.gone);
    format!(
        "-- Database {}. As long as nothing has changed there since the failover.\nSELECT xmin, ctid, * FROM ONLY {table} WHERE ctid = ANY ('{gone}'::tid[]);\n",
        database.escape_default()
    )
}

fn table_of(
    database: &str,
    file: &File,
    (changes, kept): (&Changes, &str),
    said: Result<Option<&Said>, &String>,
) -> LostTable {
    let &Changes { inserted, updated, deleted, .. } = changes;
    let File { tablespace, database: number, node } = file;
    let named = said.ok().flatten().and_then(|said| said.name.clone());
    let table = named.unwrap_or_else(|| format!("relation {tablespace}/{number}/{node}"));
    let (rows, reason) = match said {
        Ok(Some(Said { rows: Ok(count), .. })) => (Some(*count), None),
        Ok(Some(Said { rows: Err(why), .. })) => (None, Some(why.clone())),
        Ok(None) => (None, Some("nothing was said of it".into())),
        Err(why) => (None, Some(why.clone())),
    };
    let rows = rows.map(|count| (count, kept.to_owned()));
    let database = database.to_owned();
    LostTable { database, table, inserted, updated, deleted, rows, reason }
}
