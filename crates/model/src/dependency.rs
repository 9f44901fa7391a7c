//! Which applications need which others, and in which order they are changed: what is needed comes first.

use std::collections::{BTreeMap, BTreeSet};

/// Applications, and those that each needs.
pub type Needs = BTreeMap<String, BTreeSet<String>>;

/// Groups of applications, each after those that it needs; those of one group need nothing of each other.
///
/// # Errors
/// They lead back to themselves: the way, which begins and ends with the same.
pub fn groups(needs: &Needs) -> Result<Vec<Vec<String>>, Vec<String>> {
    let mut left: BTreeMap<&str, &BTreeSet<String>> =
        needs.iter().map(|(app, needed)| (app.as_str(), needed)).collect();
    let mut groups = Vec::new();
    while !left.is_empty() {
        let is_free =
            |needed: &BTreeSet<String>| needed.iter().all(|one| !left.contains_key(one.as_str()));
        let group: Vec<String> = left
            .iter()
            .filter(|(_, needed)| is_free(needed))
            .map(|(app, _)| (*app).to_owned())
            .collect();
        if group.is_empty() {
            return Err(way_back(&left));
        }
        for app in &group {
            left.remove(app.as_str());
        }
        groups.push(group);
    }
    Ok(groups)
}

/// Each of these needs another of them: whoever follows that comes by one twice.
fn way_back(left: &BTreeMap<&str, &BTreeSet<String>>) -> Vec<String> {
    let mut way: Vec<String> = Vec::new();
    let mut next = left.keys().next().copied();
    while let Some(app) = next {
        if let Some(first) = way.iter().position(|one| one == app) {
            way.drain(..first);
            way.push(app.to_owned());
            break;
        }
        way.push(app.to_owned());
        let needed = left.get(app).into_iter().flat_map(|needed| needed.iter());
        next = needed.map(String::as_str).find(|one| left.contains_key(one));
    }
    way
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn needs(pairs: &[(&str, &[&str])]) -> Needs {
        let set = |of: &[&str]| of.iter().map(|one| (*one).to_owned()).collect();
        pairs.iter().map(|(app, of)| ((*app).to_owned(), set(of))).collect()
    }

    #[test]
    fn what_is_needed_comes_first() {
        let all = needs(&[
            ("shop", &["ledger", "mail"]),
            ("ledger", &["auth"]),
            ("mail", &[]),
            ("auth", &[]),
        ]);
        let groups = groups(&all).unwrap();
        assert_eq!(groups, [vec!["auth", "mail"], vec!["ledger"], vec!["shop"]]);
    }

    #[test]
    fn a_way_back_is_named() {
        let all = needs(&[("a", &["b"]), ("b", &["c"]), ("c", &["d", "b"]), ("d", &[])]);
        assert_eq!(groups(&all).unwrap_err(), ["b", "c", "b"]);
        assert_eq!(groups(&needs(&[("a", &["a"])])).unwrap_err(), ["a", "a"]);
    }

    proptest! {
        #[test]
        fn all_come_once_or_a_way_back_is_one(edges in proptest::collection::vec((0u8..12, 0u8..12), 0..30)) {
            let mut all = Needs::new();
            for (one, other) in edges {
                all.entry(one.to_string()).or_default().insert(other.to_string());
                all.entry(other.to_string()).or_default();
            }
            match groups(&all) {
                Ok(groups) => {
                    let order: Vec<&String> = groups.iter().flatten().collect();
                    prop_assert_eq!(order.len(), all.len());
                    for (app, needed) in &all {
                        let place = |one: &String| order.iter().position(|other| *other == one);
                        prop_assert!(needed.iter().all(|one| place(one) < place(app)));
                    }
                }
                Err(way) => {
                    prop_assert!(way.len() >= 2 && way.first() == way.last());
                    for two in way.windows(2) {
                        prop_assert!(all[&two[0]].contains(&two[1]));
                    }
                }
            }
        }
    }
}
