//! Replication slots, by which a server keeps the WAL that standbys of other cells have not received (manual, section 26.2.6).

use std::collections::BTreeSet;

/// As long as a name may be (`NAMEDATALEN`).
const NAME_LEN_MAX: usize = 63;
const PREFIX: &str = "holdfast_";

/// The slot of a cell's standby. None if its name would be too long.
///
/// Names of slots have fewer characters than those of cells; all others stand as their hexadecimal bytes.
pub fn slot_name(cell: &str) -> Option<String> {
    let name = cell.bytes().fold(PREFIX.to_owned(), |name, byte| match byte {
        b'a'..=b'z' | b'0'..=b'9' => name + char::from(byte).encode_utf8(&mut [0; 4]),
        other => format!("{name}_{other:02x}"),
    });
    (name.len() <= NAME_LEN_MAX).then_some(name)
}

/// What is seen of a slot on a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    pub name: String,
    /// A standby receives by it.
    pub is_active: bool,
    /// Some of the WAL that it was to keep is gone: nobody can receive by it any more.
    pub is_lost: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Do {
    Create(String),
    Drop(String),
}

/// What is to be done to the slots of a server so that there is each that is wanted, and none of `ours`, those of cells, that
/// keeps WAL for nobody. Those of others are theirs.
pub fn next(seen: &[Slot], wanted: &BTreeSet<String>, ours: &BTreeSet<String>) -> Vec<Do> {
    let ours = || seen.iter().filter(|slot| ours.contains(&slot.name));
    let is_in_vain =
        |slot: &&Slot| !slot.is_active && (slot.is_lost || !wanted.contains(&slot.name));
    let drops = ours().filter(is_in_vain).map(|slot| Do::Drop(slot.name.clone()));
    let is_there = |name: &&String| ours().any(|slot| slot.name == **name && !slot.is_lost);
    let creates = wanted.iter().filter(|name| !is_there(name)).cloned().map(Do::Create);
    drops.chain(creates).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_cells_give_names_of_slots() {
        assert_eq!(slot_name("b").as_deref(), Some("holdfast_b"));
        assert_eq!(slot_name("eu-1").as_deref(), Some("holdfast_eu_2d1"));
        assert_ne!(slot_name("eu_2d1"), slot_name("eu-1"));
        assert_eq!(slot_name(&"B".repeat(54)), None);
    }

    #[test]
    fn there_is_one_for_each_and_none_for_nobody() {
        let slot = |name: &str, is_active, is_lost| Slot { name: name.into(), is_active, is_lost };
        let wanted = BTreeSet::from(["holdfast_b".to_owned(), "holdfast_c".to_owned()]);
        let ours: BTreeSet<String> =
            ["a", "b", "c"].iter().filter_map(|cell| slot_name(cell)).collect();
        let next = |seen: &[Slot], wanted: &BTreeSet<String>| next(seen, wanted, &ours);
        let (drop, create) =
            (|name: &str| Do::Drop(name.into()), |name: &str| Do::Create(name.into()));
        assert_eq!(next(&[], &wanted), [create("holdfast_b"), create("holdfast_c")]);
        let seen = [
            slot("holdfast_a", false, false),
            slot("holdfast_b", true, false),
            slot("holdfast_c", false, true),
            slot("holdfast_backup", false, false),
        ];
        assert_eq!(
            next(&seen, &wanted),
            [drop("holdfast_a"), drop("holdfast_c"), create("holdfast_c")]
        );
        assert_eq!(next(&seen[..1], &BTreeSet::new()), [drop("holdfast_a")]);
        // Whoever receives by it is told to receive otherwise first.
        assert_eq!(next(&seen[1..2], &BTreeSet::new()), []);
    }
}
