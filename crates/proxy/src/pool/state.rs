//! What a session has beyond a fresh login, and how a server is brought there.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use model::session::Snapshot;
use model::session::footprint::is_sensitive;
use model::sql::{quote_literal, quote_name};

use super::Welcome;

/// What a session has beyond a fresh login, and can be given anywhere: settings, its user and its role.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Beyond {
    pub settings: BTreeMap<String, String>,
    pub custom: BTreeMap<String, String>,
    pub session_user: String,
    pub role: String,
}

impl Beyond {
    pub(super) fn of(snapshot: &Snapshot) -> Beyond {
        Beyond {
            settings: snapshot.settings.clone(),
            custom: snapshot.custom.clone(),
            session_user: snapshot.session_user.clone(),
            role: snapshot.role.clone(),
        }
    }
}

/// What is beyond a login on one server, told beside what a login gives on another.
pub(super) fn rebased(state: &Beyond, before: &Welcome, here: &Welcome) -> Beyond {
    let configured =
        |of: &Welcome, name: &String| of.facts.configured.get(name).map(|one| one.value.clone());
    // What is not there is as it is configured.
    let value = |name: &String| {
        let value = state.settings.get(name).cloned().or_else(|| configured(before, name))?;
        (configured(here, name).as_ref() != Some(&value)).then(|| (name.clone(), value))
    };
    let names = state.settings.keys().chain(before.fresh.settings.keys());
    let names: BTreeSet<&String> = names.chain(here.fresh.settings.keys()).collect();
    Beyond { settings: names.into_iter().filter_map(value).collect(), ..state.clone() }
}

/// None for what a fresh login gives.
pub type State = Option<Arc<Beyond>>;

/// A setting by which statements are prepared differs. `fresh` is what a login gives.
pub(crate) fn reads_otherwise(a: &State, b: &State, fresh: &Snapshot) -> bool {
    let a = a.as_ref().map_or(&fresh.settings, |state| &state.settings);
    let b = b.as_ref().map_or(&fresh.settings, |state| &state.settings);
    let mut names = a.keys().chain(b.keys());
    names.any(|name| is_sensitive(name) && a.get(name) != b.get(name))
}

/// Whether two states are the same one: a pool has each once.
pub(crate) fn same_state(a: &State, b: &State) -> bool {
    match (a, b) {
        (None, None) => true,
        (Some(a), Some(b)) => Arc::ptr_eq(a, b),
        _ => false,
    }
}

/// What functions of a database are bound to.
#[derive(Debug, Clone, Copy, Default)]
pub struct Bound {
    /// As they were compiled, to the search path.
    pub depends: bool,
    /// As their plans were made, to any setting and the user.
    pub folds: bool,
}

impl Bound {
    /// On a server where nothing was called yet, nothing is bound.
    pub(crate) fn of(self, is_used: bool) -> Bound {
        if is_used { self } else { Bound::default() }
    }
}

/// The statements that take a server from one state to another, as one text. None if there is no way.
///
/// What the other session had set is reset, so that a reload of the configuration reaches whoever has set nothing. A
/// custom setting cannot be removed from a server, so a session without it is not given to one that has it. Nor is one
/// of another search path, if functions `depend` on the one under which they were compiled.
pub(crate) fn transition(
    from: &State,
    to: &State,
    welcome: &Welcome,
    Bound { depends, folds }: Bound,
) -> Option<String> {
    let fresh = Beyond::of(&welcome.fresh);
    let (from, to) = (from.as_deref().unwrap_or(&fresh), to.as_deref().unwrap_or(&fresh));
    if from.custom.keys().any(|name| !to.custom.contains_key(name)) {
        return None;
    }
    if from.session_user != fresh.session_user && from != to {
        // Whoever it is now may not become another.
        return None;
    }
    // The role decides what `$user` in a search path is.
    if depends && (from.role != to.role || from.session_user != to.session_user) {
        return None;
    }
    let mut text = String::new();
    // A role may not be allowed to change what its user is.
    let leaves_role = from.role != "none" && from != to;
    let mut set = |name: &str, value: &str| {
        let (name, value) = (quote_literal(name), quote_literal(value));
        text.push_str(&format!("SELECT pg_catalog.set_config({name},{value},false) IS NULL;"));
    };
    let mut resets = String::new();
    let names: BTreeSet<&String> = from.settings.keys().chain(to.settings.keys()).collect();
    let mut restyles = folds && from != to;
    for name in names {
        let wanted = to.settings.get(name);
        if from.settings.get(name) == wanted {
            continue;
        }
        restyles |= is_sensitive(name);
        if depends && name == "search_path" {
            return None;
        }
        // What is not there is as it is configured, which a login may have otherwise.
        let by_login = fresh.settings.get(name);
        let configured = || welcome.facts.configured.get(name).map(|one| &one.value);
        let wanted = match (wanted, by_login) {
            (None, Some(_)) => configured(),
            _ => wanted,
        };
        match wanted.filter(|value| by_login != Some(value)) {
            Some(value) => set(name, value),
            None => resets.push_str(&format!("RESET {};", quote_name(name))),
        }
    }
    for (name, value) in &to.custom {
        if from.custom.get(name) != Some(value) {
            set(name, value);
        }
    }
    if from.session_user != to.session_user {
        set("session_authorization", &to.session_user);
    }
    if to.role != "none" && (leaves_role || from != to) {
        set("role", &to.role);
    }
    if restyles {
        // Plans of functions hold literals and constants as they were read under the other settings.
        text.push_str("DISCARD PLANS;");
    }
    let first = if leaves_role { "SET ROLE NONE;" } else { "" };
    let text = [first, &resets, &text].concat();
    let encoding = from.settings.get("client_encoding").or(welcome.params.get("client_encoding"));
    (text.is_ascii() || encoding.is_some_and(|name| name == "UTF8")).then_some(text)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::app::Cell;

    fn welcome() -> Welcome {
        let target = pg::Target {
            address: pg::Address { host: "127.0.0.1".into(), port: 1 },
            tls: tls::ClientTls::load(tls::SslMode::Disable, None, None).unwrap(),
            keepalive: pg::stream::Keepalive::default(),
            timeout: std::time::Duration::from_secs(1),
        };
        let mut fresh =
            Snapshot { session_user: "app".into(), role: "none".into(), ..Snapshot::default() };
        fresh.settings.insert("work_mem".into(), "3MB".into());
        let params = [("client_encoding".to_owned(), "UTF8".to_owned())].into();
        Welcome {
            cell: Arc::new(Cell { name: "a".into(), target }),
            params: Arc::new(params),
            facts: Arc::default(),
            fresh,
        }
    }

    fn state(change: impl FnOnce(&mut Beyond)) -> State {
        let mut beyond = Beyond::of(&welcome().fresh);
        change(&mut beyond);
        Some(Arc::new(beyond))
    }

    fn way(from: &State, to: &State) -> Option<String> {
        transition(from, to, &welcome(), Bound::default())
    }

    #[test]
    fn what_another_session_has_set_is_reset() {
        let set = state(|one| drop(one.settings.insert("lock_timeout".into(), "1s".into())));
        let there = "SELECT pg_catalog.set_config('lock_timeout','1s',false) IS NULL;";
        assert_eq!(way(&None, &set).unwrap(), there);
        assert_eq!(way(&set, &None).unwrap(), "RESET \"lock_timeout\";");
        assert_eq!(way(&set, &set).unwrap(), "");
        let own = state(|one| drop(one.settings.insert("work_mem".into(), "9MB".into())));
        assert_eq!(way(&own, &None).unwrap(), "RESET \"work_mem\";");
    }

    #[test]
    fn what_a_login_gives_reads_as_a_login_does() {
        let mut fresh = welcome().fresh;
        fresh.settings.insert("DateStyle".into(), "German".into());
        let mut beyond = Beyond::of(&fresh);
        beyond.settings.insert("work_mem".into(), "9MB".into());
        let set = Some(Arc::new(beyond.clone()));
        assert!(!reads_otherwise(&None, &set, &fresh));
        beyond.settings.insert("DateStyle".into(), "ISO".into());
        assert!(reads_otherwise(&None, &Some(Arc::new(beyond)), &fresh));
    }

    #[test]
    fn plans_are_made_anew_where_they_depend_on_what_differs() {
        let tokyo = state(|one| drop(one.settings.insert("TimeZone".into(), "Asia/Tokyo".into())));
        assert!(way(&None, &tokyo).unwrap().ends_with("DISCARD PLANS;"));
        assert_eq!(way(&tokyo, &None).unwrap(), "RESET \"TimeZone\";DISCARD PLANS;");
    }

    #[test]
    fn a_custom_setting_cannot_be_taken_away() {
        let one = state(|one| drop(one.custom.insert("app.x".into(), "it's".into())));
        let other = state(|one| drop(one.custom.insert("app.x".into(), "2".into())));
        assert_eq!(way(&one, &None), None);
        let there = "SELECT pg_catalog.set_config('app.x','it''s',false) IS NULL;";
        assert_eq!(way(&other, &one).unwrap(), there);
    }

    #[test]
    fn a_role_is_left_before_anything_is_set() {
        let reader = state(|one| one.role = "reader".into());
        let both = state(|one| {
            one.role = "reader".into();
            one.settings.insert("geqo".into(), "off".into());
        });
        let role = "SELECT pg_catalog.set_config('role','reader',false) IS NULL;";
        assert_eq!(way(&None, &reader).unwrap(), role);
        assert_eq!(way(&reader, &None).unwrap(), "SET ROLE NONE;");
        let text = way(&reader, &both).unwrap();
        assert!(text.starts_with("SET ROLE NONE;") && text.contains(role), "{text}");
        let other = state(|one| one.session_user = "other".into());
        assert_eq!(way(&other, &None), None);
    }

    #[test]
    fn a_search_path_stays_where_functions_were_compiled() {
        let path = state(|one| drop(one.settings.insert("search_path".into(), "a".into())));
        assert!(way(&None, &path).is_some());
        let depends = Bound { depends: true, ..Bound::default() };
        assert_eq!(transition(&None, &path, &welcome(), depends), None);
        let folds = Bound { folds: true, ..Bound::default() };
        let text = transition(&None, &path, &welcome(), folds).unwrap();
        assert!(text.ends_with("DISCARD PLANS;"), "{text}");
    }

    #[test]
    fn other_letters_need_an_encoding_that_is_known() {
        let odd = state(|one| drop(one.settings.insert("application_name".into(), "é".into())));
        let latin =
            state(|one| drop(one.settings.insert("client_encoding".into(), "LATIN1".into())));
        assert!(way(&None, &odd).is_some());
        assert_eq!(way(&latin, &odd), None);
    }
}
