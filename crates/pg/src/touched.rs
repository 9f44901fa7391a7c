//! Which rows committed transactions have written, by the lines of `pg_waldump` (`heapdesc.c`, `xactdesc.c`, `standbydesc.c`;
//! the offsets are written otherwise since version 16).

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use model::Lsn;

/// Places of rows that are kept in mind; other changes are counted.
const PLACES_MAX: usize = 300_000;
/// Lines on a page (`MaxHeapTuplesPerPage` of pages of 8 KiB), where it is not told which of them were written.
const LINES_MAX: u64 = 291;

/// A table's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct File {
    pub(crate) database: u32,
    pub(crate) tablespace: u32,
    pub(crate) node: u32,
}

/// Where a row is: block and line.
type Place = (u32, u64);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Insert,
    Update,
    Delete,
    /// The page has rows of this transaction, on which lines nobody says.
    Page,
}

#[derive(Debug, Clone, Copy)]
struct Write {
    file: File,
    kind: Kind,
    place: Place,
    /// As many rows as this were written by it, or with it.
    rows: u64,
}

impl Write {
    fn places(&self) -> usize {
        match self.kind {
            Kind::Page => LINES_MAX as usize,
            Kind::Insert | Kind::Update | Kind::Delete => 1,
        }
    }
}

/// What was done to one table.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Changes {
    pub(crate) inserted: u64,
    pub(crate) updated: u64,
    pub(crate) deleted: u64,
    /// Where rows were written that may be there still.
    pub(crate) written: BTreeSet<Place>,
    /// Where rows were deleted that had been there before.
    pub(crate) gone: BTreeSet<Place>,
}

impl Changes {
    pub(crate) fn count(&self) -> u64 {
        self.inserted + self.updated + self.deleted
    }
}

#[derive(Debug)]
pub(crate) struct Touched {
    /// Commits from here on count.
    from: Lsn,
    /// By transactions of which it is not known how they end.
    open: HashMap<u32, Vec<Write>>,
    in_mind: usize,
    /// Too many writes by these.
    beyond: HashMap<u32, u64>,
    /// Transactions that have written what is kept in mind, and committed.
    pub(crate) committed: HashSet<u32>,
    lost: Vec<Write>,
    pub(crate) lost_beyond: u64,
    /// Those that committed, and did not begin in what was read.
    pub(crate) cut: u64,
    /// Whoever has this number or a later one began in what was read.
    next: Option<u32>,
}

impl Touched {
    pub(crate) fn since(from: Lsn) -> Touched {
        Touched {
            from,
            open: HashMap::new(),
            in_mind: 0,
            beyond: HashMap::new(),
            committed: HashSet::new(),
            lost: Vec::new(),
            lost_beyond: 0,
            cut: 0,
            next: None,
        }
    }

    pub(crate) fn read(&mut self, line: &str) {
        let Some((head, desc)) = line.split_once(", desc: ") else { return };
        let field = |name: &str| head.split_once(name).map(|(_, rest)| rest.trim_start());
        let xid = field(" tx:").and_then(number).and_then(|xid| u32::try_from(xid).ok());
        let lsn = field(" lsn:").and_then(|rest| Lsn::read(rest.split(',').next()?));
        let (Some(xid), Some(lsn)) = (xid, lsn) else { return };
        if head.starts_with("rmgr: Heap") {
            self.write(xid, desc);
        } else if head.starts_with("rmgr: Transaction") {
            self.end(xid, lsn, desc);
        } else if let Some((_, rest)) = desc.split_once("nextXid ") {
            let next = number(rest).and_then(|xid| u32::try_from(xid).ok());
            self.next = self.next.or(next);
        }
    }

    fn write(&mut self, xid: u32, desc: &str) {
        let Some((file, block)) = first_block(desc) else { return };
        let what = desc.split_whitespace().next().unwrap_or_default();
        let at = |key: &str| after(desc, key);
        let one = |kind, line: Option<u64>| {
            line.map(|line| vec![Write { file, kind, place: (block, line), rows: 1 }])
        };
        let writes = match what.trim_end_matches("+INIT") {
            "INSERT" => one(Kind::Insert, at(" off")),
            "UPDATE" | "HOT_UPDATE" => one(Kind::Update, at(" new off").or_else(|| at(" new_off"))),
            "DELETE" => one(Kind::Delete, at(" off")),
            "MULTI_INSERT" => several(what, desc).map(|lines| match lines {
                Lines::These(lines) => lines
                    .into_iter()
                    .map(|line| Write { file, kind: Kind::Insert, place: (block, line), rows: 1 })
                    .collect(),
                Lines::Some(rows) => {
                    vec![Write { file, kind: Kind::Page, place: (block, 0), rows }]
                }
            }),
            _ => None,
        };
        for write in writes.into_iter().flatten() {
            if self.in_mind >= PLACES_MAX {
                *self.beyond.entry(xid).or_default() += write.rows;
                continue;
            }
            self.in_mind += write.places();
            self.open.entry(xid).or_default().push(write);
        }
    }

    fn end(&mut self, xid: u32, lsn: Lsn, desc: &str) {
        let what = desc.split_whitespace().next().unwrap_or_default();
        let prepared = || after(desc, "_PREPARED").and_then(|xid| u32::try_from(xid).ok());
        let top = match what {
            "COMMIT" | "ABORT" => Some(xid),
            "COMMIT_PREPARED" | "ABORT_PREPARED" => prepared(),
            _ => None,
        };
        let Some(top) = top else { return };
        let below = desc.split_once("; subxacts:").map(|(_, rest)| rest).unwrap_or_default();
        let below = below.split(';').next().unwrap_or_default().split_whitespace();
        let all = std::iter::once(top).chain(below.filter_map(|xid| xid.parse().ok()));
        let is_lost = what.starts_with("COMMIT") && lsn >= self.from;
        let (mut has_written, mut is_old) = (false, false);
        for xid in all {
            let writes = self.open.remove(&xid).unwrap_or_default();
            let beyond = self.beyond.remove(&xid).unwrap_or_default();
            if !is_lost {
                self.in_mind -= writes.iter().map(Write::places).sum::<usize>();
                continue;
            }
            has_written |= !writes.is_empty() || beyond > 0;
            is_old |= self.next.is_none_or(|next| precedes(xid, next));
            // Of the others nothing is looked for, and there may be any number of them.
            if !writes.is_empty() {
                self.committed.insert(xid);
            }
            self.lost.extend(writes);
            self.lost_beyond += beyond;
        }
        if has_written && is_old {
            self.cut += 1;
        }
    }

    pub(crate) fn changes(&self) -> BTreeMap<File, Changes> {
        let mut all: BTreeMap<File, Changes> = BTreeMap::new();
        for &Write { file, kind, place, rows } in &self.lost {
            let changes = all.entry(file).or_default();
            match kind {
                Kind::Insert | Kind::Page => changes.inserted += rows,
                Kind::Update => changes.updated += rows,
                Kind::Delete => changes.deleted += rows,
            }
            match kind {
                Kind::Insert | Kind::Update => drop(changes.written.insert(place)),
                Kind::Page => changes.written.extend((1..=LINES_MAX).map(|line| (place.0, line))),
                Kind::Delete if changes.written.remove(&place) => (),
                Kind::Delete => drop(changes.gone.insert(place)),
            }
        }
        all
    }
}

/// Numbers of transactions go round (`TransactionIdPrecedes`).
fn precedes(one: u32, other: u32) -> bool {
    one != other && other.wrapping_sub(one) < 1 << 31
}

enum Lines {
    These(Vec<u64>),
    Some(u64),
}

fn several(what: &str, desc: &str) -> Option<Lines> {
    let count = after(desc, "ntuples").or_else(|| number(desc.split_once(' ')?.1))?;
    let count = count.min(LINES_MAX);
    if what.ends_with("+INIT") {
        return Some(Lines::These((1..=count).collect()));
    }
    let listed = desc.split_once("offsets: [").and_then(|(_, rest)| rest.split(']').next());
    Some(match listed {
        Some(listed) => {
            Lines::These(listed.split(", ").filter_map(|line| line.parse().ok()).collect())
        }
        None => Lines::Some(count),
    })
}

/// The number that a text begins with.
fn number(text: &str) -> Option<u64> {
    let end = text.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(text.len());
    text.get(..end)?.parse().ok()
}

/// The number behind a word, with or without a colon.
fn after(desc: &str, key: &str) -> Option<u64> {
    let (_, rest) = desc.split_once(key)?;
    number(rest.trim_start_matches([':', ' ']))
}

/// Of the first block that a record has changed, which file it is of, and its number.
fn first_block(desc: &str) -> Option<(File, u32)> {
    let (_, rest) = desc.split_once("blkref #0: rel ")?;
    let (file, rest) = rest.split_once(" blk ")?;
    let mut parts = file.split('/').map(|part| part.parse().ok());
    let file = File { tablespace: parts.next()??, database: parts.next()??, node: parts.next()?? };
    Some((file, u32::try_from(number(rest)?).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "len (rec/tot):     54/   562";

    fn heap(xid: u32, lsn: &str, desc: &str) -> String {
        format!(
            "rmgr: Heap        {HEAD}, tx:        {xid}, lsn: {lsn}, prev 0/019447D0, desc: {desc}"
        )
    }

    fn end(xid: u32, lsn: &str, desc: &str) -> String {
        format!(
            "rmgr: Transaction {HEAD}, tx:        {xid}, lsn: {lsn}, prev 0/019447D0, desc: {desc}"
        )
    }

    fn running(next: u32) -> String {
        format!(
            "rmgr: Standby     {HEAD}, tx:          0, lsn: 0/01944000, prev 0/019447D0, desc: RUNNING_XACTS nextXid {next} latestCompletedXid 725 oldestRunningXid 726"
        )
    }

    fn read(lines: &[String]) -> Touched {
        let mut touched = Touched::since(Lsn::read("0/2000000").unwrap());
        lines.iter().for_each(|line| touched.read(line));
        touched
    }

    /// The lines of 15 and those of later versions say the same.
    #[test]
    fn rows_are_found_in_all_versions() {
        let old = [
            "INSERT off 11 flags 0x00, blkref #0: rel 1663/5/16384 blk 0 FPW",
            "HOT_UPDATE off 3 xmax 728 flags 0x20 ; new off 22 xmax 0, blkref #0: rel 1663/5/16384 blk 0",
            "DELETE off 4 flags 0x00 KEYS_UPDATED , blkref #0: rel 1663/5/16384 blk 7",
            "MULTI_INSERT+INIT 2 tuples flags 0x02, blkref #0: rel 1663/5/16384 blk 1",
        ];
        let new = [
            "INSERT off: 11, flags: 0x00, blkref #0: rel 1663/5/16384 blk 0 FPW",
            "HOT_UPDATE old_xmax: 728, old_off: 3, old_infobits: [], flags: 0x20, new_xmax: 0, new_off: 22, blkref #0: rel 1663/5/16384 blk 0",
            "DELETE xmax: 729, off: 4, infobits: [KEYS_UPDATED], flags: 0x00, blkref #0: rel 1663/5/16384 blk 7",
            "MULTI_INSERT+INIT ntuples: 2, flags: 0x02, blkref #0: rel 1663/5/16384 blk 1",
        ];
        for lines in [old, new] {
            let mut all: Vec<String> =
                lines.iter().map(|line| heap(726, "0/2000010", line)).collect();
            all.push(end(726, "0/2000020", "COMMIT 2026-11-23 23:50:28.309725 UTC"));
            let changes = read(&all).changes();
            let table = File { tablespace: 1663, database: 5, node: 16384 };
            let expected = Changes {
                inserted: 3,
                updated: 1,
                deleted: 1,
                written: BTreeSet::from([(0, 11), (0, 22), (1, 1), (1, 2)]),
                gone: BTreeSet::from([(7, 4)]),
            };
            assert_eq!(changes.get(&table), Some(&expected));
        }
        let page = "MULTI_INSERT 2 tuples flags 0x02, blkref #0: rel 1663/5/16384 blk 1";
        let listed = "MULTI_INSERT ntuples: 2, flags: 0x02, offsets: [4, 6], blkref #0: rel 1663/5/16384 blk 1";
        for (line, places) in [(page, 291), (listed, 2)] {
            let commit = end(726, "0/2000020", "COMMIT 2026-11-23 23:50:28.309725 UTC");
            let touched = read(&[heap(726, "0/2000010", line), commit]);
            let changes = touched.changes().into_values().next().unwrap();
            assert_eq!((changes.inserted, changes.written.len()), (2, places));
        }
    }

    /// What counts is when a transaction has committed, not when it has written.
    #[test]
    fn only_what_was_committed_there_is_lost() {
        let insert =
            |off: u64| format!("INSERT off {off} flags 0x00, blkref #0: rel 1663/5/16384 blk 0");
        let touched = read(&[
            running(727),
            heap(726, "0/1000010", &insert(1)),
            heap(727, "0/1000010", &insert(2)),
            end(727, "0/1000020", "COMMIT 2026-11-23 23:50:28.3 UTC"),
            heap(730, "0/2000010", &insert(3)),
            end(730, "0/2000020", "ABORT 2026-11-23 23:50:28.3 UTC"),
            heap(732, "0/2000010", &insert(4)),
            end(
                731,
                "0/2000020",
                "COMMIT 2026-11-23 23:50:28.3 UTC; subxacts: 732; inval msgs: catcache 80",
            ),
            heap(733, "0/2000010", &insert(5)),
            end(0, "0/2000020", "COMMIT_PREPARED 733: 2026-11-23 23:50:28.3 UTC"),
            end(726, "0/2000020", "COMMIT 2026-11-23 23:50:28.3 UTC"),
            heap(740, "0/2000030", &insert(6)),
        ]);
        let changes = touched.changes().into_values().next().unwrap();
        assert_eq!(changes.written, BTreeSet::from([(0, 1), (0, 4), (0, 5)]));
        assert_eq!(
            touched.committed,
            HashSet::from([726, 732, 733]),
            "731 has written nothing itself"
        );
        assert_eq!(touched.cut, 1, "726 began before");
    }

    /// A row that was there for a while only, nobody lacks.
    #[test]
    fn what_was_deleted_again_is_no_row() {
        let touched = read(&[
            heap(730, "0/2000010", "INSERT off 3 flags 0x00, blkref #0: rel 1663/5/16384 blk 0"),
            heap(730, "0/2000018", "DELETE off 3 flags 0x00 , blkref #0: rel 1663/5/16384 blk 0"),
            end(730, "0/2000020", "COMMIT 2026-11-23 23:50:28.3 UTC"),
        ]);
        let changes = touched.changes().into_values().next().unwrap();
        assert!(changes.written.is_empty() && changes.gone.is_empty(), "{changes:?}");
    }

    #[test]
    fn whatever_is_read_does_not_panic() {
        let mut touched = Touched::since(Lsn(0));
        for line in [
            "",
            ", desc: ",
            "rmgr: Heap tx: 99999999999, lsn: 0/1, desc: INSERT off",
            "rmgr: Heap tx: 1, lsn: 0/1, desc: INSERT off 99999999999999999999, blkref #0: rel 1/2 blk 3",
            "rmgr: Heap tx: 1, lsn: 0/1, desc: MULTI_INSERT ntuples: 99999999999, offsets: [, blkref #0: rel 1/2/3 blk 3",
            "rmgr: Transaction tx: 1, lsn: 0/1, desc: COMMIT_PREPARED",
        ] {
            touched.read(line);
        }
        assert!(precedes(u32::MAX, 3) && !precedes(3, u32::MAX) && !precedes(3, 3));
    }
}
