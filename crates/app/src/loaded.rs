//! The configuration that runs, beside the file that it was read from: what is different, and what can be taken up at once.
//!
//! What is taken up of an application is taken up as a whole, and only where nothing else of it waits for a restart: what the
//! file says was checked together.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use control::audit::digest_of;
use control::live::Live;
use control::{Control, ControlConfig};
use proxy::Reread;
use serde::{Deserialize, Serialize};
use toml::de::{DeTable, DeValue};

use crate::api::access::Access;
use crate::config::{Roles, chain};

/// A setting: the names on the way to it. Of several tables of a name each goes by its `name`.
type Way = Vec<String>;

/// Of an application, what is taken up at once. What they are set to is no secret.
const LIVE: [&str; 5] = ["failover", "durability", "objectives", "slots", "safety"];
/// As well, once sessions are at a safe point.
const RULES: &str = "policy";
/// As well, but somebody else's passwords may be in it.
const LIVE_PLANS: [&str; 2] = ["plan", "alarm"];

/// What is different in the file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Change {
    pub(crate) setting: String,
    /// None: it is not there, or not shown, as it may be a secret.
    pub(crate) from: Option<String>,
    pub(crate) to: Option<String>,
    pub(crate) takes: Takes,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Takes {
    Now,
    /// It could not be taken up now.
    Later,
    Restart,
    /// Of proxies, each of which goes by its own file.
    Elsewhere,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Changes {
    /// Of the file: the begin of its SHA-256.
    pub(crate) version: String,
    pub(crate) changes: Vec<Change>,
    /// What else is to be said: of rules for commands, which proxies take up, each from its own file, and of tokens.
    pub(crate) notes: Vec<String>,
    /// The node that this is about, where there are several.
    pub(crate) node: Option<String>,
}

/// The file of a process, and what it goes by of it.
pub(crate) struct Runs {
    path: PathBuf,
    settings: Mutex<BTreeMap<Way, String>>,
}

impl Runs {
    pub(crate) fn new(path: &Path, text: &str) -> Runs {
        Runs { path: path.to_owned(), settings: Mutex::new(settings(text)) }
    }

    fn settings(&self) -> MutexGuard<'_, BTreeMap<Way, String>> {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The rules for commands of an application, as the file has them now.
    ///
    /// # Errors
    /// The file cannot be read, has mistakes, or has no such application for a proxy.
    pub(crate) fn rules(&self, app: &str) -> Result<Reread, String> {
        let (roles, text) = Roles::load_with_text(&self.path).map_err(|error| chain(&error))?;
        let path = self.path.display();
        let apps = match roles {
            Roles::Here(config) => config.proxy.apps,
            Roles::Proxy(config) => config.proxy.apps,
            Roles::Node(_) | Roles::Agent(_) => {
                return Err(format!("`{path}` is not that of a proxy any more"));
            }
        };
        let found = apps.into_iter().find(|one| one.name == app);
        let found = found.ok_or_else(|| format!("`{path}` has no application `{app}` any more"))?;
        let differ = compare(&self.settings(), &settings(&text));
        let waits = (!differ.is_app_now(app))
            .then(|| format!("in `{path}` something else of `{app}` waits for a restart"));
        Ok(Reread { policy: found.policy, waits })
    }
}

/// What runs, of a process of control.
pub(crate) struct Loaded {
    runs: Runs,
    control: ControlConfig,
    access: Live<Access>,
    node: Option<String>,
}

impl Loaded {
    pub(crate) fn new(
        (path, text): (&Path, &str),
        control: ControlConfig,
        access: Live<Access>,
        node: Option<String>,
    ) -> Loaded {
        Loaded { runs: Runs::new(path, text), control, access, node }
    }

    /// The rules for commands of an application, as the file has them now.
    ///
    /// # Errors
    /// As [`Runs::rules`].
    pub(crate) fn rules(&self, app: &str) -> Result<Reread, String> {
        self.runs.rules(app)
    }

    /// What is different in the file.
    ///
    /// # Errors
    /// It cannot be read, or has mistakes.
    pub(crate) fn diff(&self) -> Result<Changes, String> {
        let (_, text, access) = self.read()?;
        let differ = compare(&self.runs.settings(), &settings(&text));
        let mut changes = self.changes(&text, &differ);
        self.note_tokens(&mut changes, &access, &differ);
        Ok(changes)
    }

    fn read(&self) -> Result<(ControlConfig, String, Access), String> {
        let path = &self.runs.path;
        let (roles, text) = Roles::load_with_text(path).map_err(|error| chain(&error))?;
        let (control, api) = match roles {
            Roles::Here(config) => (config.control, config.api),
            Roles::Node(config) => (config.control, config.api),
            Roles::Agent(_) | Roles::Proxy(_) => {
                let path = path.display();
                return Err(format!(
                    "`{path}` is not that of control any more: a restart is needed"
                ));
            }
        };
        Ok((control, text, Access::clone(&api.access.now())))
    }

    /// What the text of the file does not show.
    fn note_tokens(&self, changes: &mut Changes, read: &Access, differ: &Differences) {
        let runs = self.access.now();
        let takes = if differ.takes_tokens { "at once" } else { "at a restart" };
        for name in runs.with_other_secrets(read) {
            changes.notes.push(format!("token `{name}` has another secret: taken up {takes}"));
        }
        if read.is_open() && !runs.is_open() {
            let who = "whoever reaches the API may do everything without a token";
            changes.notes.push(format!("{who}: taken up {takes}"));
        }
    }

    fn changes(&self, text: &str, differ: &Differences) -> Changes {
        let version = digest_of(text.as_bytes()).chars().take(12).collect();
        let change = |(way, (from, to)): (&Way, &(Option<String>, Option<String>))| {
            let takes = match differ.is_now(way) {
                _ if self.node.is_some() && is_rule(way) => Takes::Elsewhere,
                true => Takes::Now,
                false => Takes::Restart,
            };
            let shown = |value: &Option<String>| value.clone().filter(|_| is_shown(way));
            Change { setting: way.join("."), from: shown(from), to: shown(to), takes }
        };
        let changes = differ.settings.iter().map(change).collect();
        Changes { version, changes, notes: Vec::new(), node: self.node.clone() }
    }

    /// Takes up what can be.
    ///
    /// # Errors
    /// The file cannot be read, or has mistakes; nothing is taken up.
    pub(crate) fn apply(&self) -> Result<Changes, String> {
        // Of two at once the later one reads the later file.
        let mut runs = self.runs.settings();
        let (control, text, access) = self.read()?;
        let differ = compare(&runs, &settings(&text));
        let mut changes = self.changes(&text, &differ);
        self.note_tokens(&mut changes, &access, &differ);
        for (app, servers) in &self.control.apps {
            if let Some(read) = control.apps.get(app).filter(|_| differ.is_app_now(app)) {
                servers.settings.set(read.now());
            }
        }
        // Secrets are in files of their own, whose names may be the same as before.
        if differ.takes_tokens {
            self.access.set(Arc::new(access));
        }
        // Those of a node are nobody's.
        let is_taken = |way: &Way| match self.node {
            Some(_) if is_rule(way) => true,
            _ => differ.is_now(way) && !is_rule(way),
        };
        for (way, (_, to)) in differ.settings.iter().filter(|(way, _)| is_taken(way)) {
            match to.clone() {
                Some(value) => drop(runs.insert(way.clone(), value)),
                None => drop(runs.remove(way)),
            }
        }
        Ok(changes)
    }

    /// Rules of an application were taken up as they are in the file.
    fn rules_taken(&self, app: &str) {
        let Ok((_, text)) = Roles::load_with_text(&self.runs.path) else { return };
        let now = settings(&text);
        let mut runs = self.runs.settings();
        let is_its = |way: &Way| is_rule(way) && way.get(1).is_some_and(|name| name == app);
        runs.retain(|way, _| !is_its(way));
        runs.extend(now.into_iter().filter(|(way, _)| is_its(way)));
    }
}

/// What is different, rules in the files of proxies included.
///
/// # Errors
/// The file cannot be read, or has mistakes.
pub(crate) async fn diff(loaded: &Loaded, control: &Control) -> Result<Changes, String> {
    let mut changes = loaded.diff()?;
    for app in control.config.apps.keys() {
        match control.other_rules(app).await {
            Ok(0) => (),
            Ok(count) => changes
                .notes
                .push(format!("{count} proxies have other rules for `{app}` in their files")),
            Err(error) => changes.notes.push(format!("rules of `{app}`: {}", chain(&error))),
        }
    }
    Ok(changes)
}

/// Takes up what can be, rules in the files of proxies included.
///
/// # Errors
/// The file cannot be read, or has mistakes; nothing is taken up.
pub(crate) async fn take_up(loaded: &Loaded, control: &Control) -> Result<Changes, String> {
    let mut changes = loaded.apply()?;
    for app in control.config.apps.keys() {
        match control.reload_rules(app).await {
            // They say the same in other words, unless they are not to change yet.
            Ok(0) => {
                if loaded.rules(app).is_ok_and(|read| read.waits.is_none()) {
                    loaded.rules_taken(app);
                }
            }
            Ok(count) => {
                loaded.rules_taken(app);
                changes.notes.push(format!("{count} proxies go by the new rules of `{app}`"));
            }
            Err(error) => {
                let its = format!("app.{app}.{RULES}.");
                for change in &mut changes.changes {
                    if change.setting.starts_with(&its) && change.takes == Takes::Now {
                        change.takes = Takes::Later;
                    }
                }
                changes.notes.push(format!("rules of `{app}` are not taken up: {}", chain(&error)));
            }
        }
    }
    Ok(changes)
}

impl Changes {
    pub(crate) fn is_empty(&self) -> bool {
        self.changes.is_empty() && self.notes.is_empty()
    }

    /// What was taken up, for the audit: what it is set to stays in the file.
    pub(crate) fn says(&self) -> String {
        let of = |takes: Takes| -> Vec<&str> {
            let these = self.changes.iter().filter(|change| change.takes == takes);
            these.map(|change| change.setting.as_str()).collect()
        };
        let (now, later) = (of(Takes::Now), of(Takes::Restart));
        let mut text = format!("configuration {}: ", self.version);
        text.push_str(&match now.is_empty() {
            true => "nothing".to_owned(),
            false => now.join(", "),
        });
        for line in &self.notes {
            text.push_str(&format!("; {line}"));
        }
        if !later.is_empty() {
            text.push_str(&format!("; a restart takes up {}", later.join(", ")));
        }
        text
    }
}

/// What is different, and what of it has to wait.
struct Differences {
    settings: BTreeMap<Way, (Option<String>, Option<String>)>,
    /// Something of `[control]` waits for a restart, on which what applications may have hangs.
    control_waits: bool,
    /// Applications of which something does, or of which a plan names one of these.
    apps_wait: BTreeSet<String>,
    /// Unless the address waits and nobody would need a token any more.
    takes_tokens: bool,
}

impl Differences {
    fn is_app_now(&self, app: &str) -> bool {
        !self.control_waits && !self.apps_wait.contains(app)
    }

    fn is_now(&self, way: &Way) -> bool {
        match kind_of(way) {
            Kind::OfApp(app) => self.is_app_now(app),
            Kind::Token => self.takes_tokens,
            Kind::Restart => false,
        }
    }
}

enum Kind<'a> {
    OfApp(&'a str),
    Token,
    Restart,
}

fn kind_of(way: &Way) -> Kind<'_> {
    let names: Vec<&str> = way.iter().map(String::as_str).collect();
    match names.as_slice() {
        ["app", app, what, ..]
            if LIVE.contains(what) || LIVE_PLANS.contains(what) || *what == RULES =>
        {
            Kind::OfApp(app)
        }
        ["control", "token" | "token_file", ..] => Kind::Token,
        _ => Kind::Restart,
    }
}

fn is_shown(way: &Way) -> bool {
    let is_known = |what: &str| LIVE.contains(&what) || what == RULES;
    matches!(way.as_slice(), [app, _, what, ..] if app == "app" && is_known(what))
}

fn is_rule(way: &Way) -> bool {
    matches!(way.as_slice(), [app, _, what, ..] if app == "app" && what == RULES)
}

fn compare(before: &BTreeMap<Way, String>, after: &BTreeMap<Way, String>) -> Differences {
    let ways: BTreeSet<&Way> = before.keys().chain(after.keys()).collect();
    let differs = |way: &Way| {
        let (from, to) = (before.get(way), after.get(way));
        (from != to).then(|| (way.clone(), (from.cloned(), to.cloned())))
    };
    let settings: BTreeMap<_, _> = ways.into_iter().filter_map(differs).collect();
    let waits = || settings.keys().filter(|way| matches!(kind_of(way), Kind::Restart));
    let of = |way: &&Way, first: &str| way.first().is_some_and(|name| name == first);
    let control_waits = waits().any(|way| of(&way, "control"));
    let apps = waits().filter(|way| of(way, "app")).filter_map(|way| way.get(1).cloned());
    let mut apps_wait: BTreeSet<String> = apps.collect();
    let all = before.keys().chain(after.keys()).filter(|way| of(way, "app"));
    let all: BTreeSet<&String> = all.filter_map(|way| way.get(1)).collect();
    let named = |(way, value): (&Way, &String)| -> Vec<(String, String)> {
        let is_plan =
            of(&way, "app") && way.get(2).is_some_and(|name| LIVE_PLANS.contains(&&**name));
        let Some(app) = way.get(1).filter(|_| is_plan && way.len() > 4) else { return Vec::new() };
        match way.last().map(String::as_str) {
            Some("app") => vec![(app.clone(), value.clone())],
            // Whichever has a cell there.
            Some("leave") => all.iter().map(|other| (app.clone(), (*other).clone())).collect(),
            _ => Vec::new(),
        }
    };
    let named: BTreeSet<(String, String)> = after.iter().flat_map(named).collect();
    loop {
        let waits = |(app, of): &(String, String)| {
            (apps_wait.contains(of) && !apps_wait.contains(app)).then(|| app.clone())
        };
        let more: Vec<String> = named.iter().filter_map(waits).collect();
        if more.is_empty() {
            break;
        }
        apps_wait.extend(more);
    }
    let has_tokens = after.keys().any(|way| matches!(kind_of(way), Kind::Token));
    let takes_tokens = !control_waits || has_tokens;
    Differences { settings, control_waits, apps_wait, takes_tokens }
}

/// Each setting of a file, by the way to it.
fn settings(text: &str) -> BTreeMap<Way, String> {
    let mut found = BTreeMap::new();
    let (document, _) = DeTable::parse_recoverable(text);
    walk_table(document.get_ref(), &Vec::new(), &mut found);
    found
}

fn walk_table(table: &DeTable<'_>, way: &Way, found: &mut BTreeMap<Way, String>) {
    for (name, value) in table.iter() {
        let mut way = way.clone();
        way.push(name.get_ref().to_string());
        walk(value.get_ref(), &way, found);
    }
}

fn walk(value: &DeValue<'_>, way: &Way, found: &mut BTreeMap<Way, String>) {
    match value {
        DeValue::Table(table) => walk_table(table, way, found),
        DeValue::Array(all) if all.iter().any(|one| matches!(one.get_ref(), DeValue::Table(_))) => {
            for (at, one) in all.iter().enumerate() {
                let name = match one.get_ref() {
                    DeValue::Table(table) => {
                        table.get("name").and_then(|name| name.get_ref().as_str())
                    }
                    _ => None,
                };
                let mut way = way.clone();
                way.push(name.map_or_else(|| at.to_string(), str::to_owned));
                if way.iter().any(|name| name == "step" || name == RULES) {
                    // Which is before which.
                    let mut place = way.clone();
                    place.push("(place)".into());
                    found.insert(place, at.to_string());
                }
                walk(one.get_ref(), &way, found);
            }
        }
        leaf => drop(found.insert(way.clone(), shown(leaf))),
    }
}

fn shown(value: &DeValue<'_>) -> String {
    match value {
        DeValue::String(text) => text.to_string(),
        DeValue::Integer(number) => number.to_string(),
        DeValue::Float(number) => number.to_string(),
        DeValue::Boolean(is) => is.to_string(),
        DeValue::Datetime(at) => at.to_string(),
        DeValue::Array(all) => {
            let quoted = |one: &DeValue<'_>| match one {
                DeValue::String(text) => format!("{text:?}"),
                other => shown(other),
            };
            let all: Vec<String> = all.iter().map(|one| quoted(one.get_ref())).collect();
            format!("[{}]", all.join(", "))
        }
        DeValue::Table(_) => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUNS: &str = "[control]\nlisten = \"127.0.0.1:1\"\n[[control.token]]\nname = \"ops\"\nrole = \"operator\"\n\
        [[app]]\nname = \"shop\"\nslots = true\n[app.failover]\nautomatic = true\n[[app.cell]]\nname = \"a\"\nconninfo = \"password=x\"\n\
        [[app]]\nname = \"billing\"\n";

    fn differ(change: &[(&str, &str)]) -> Vec<(String, bool)> {
        let text = change.iter().fold(RUNS.to_owned(), |text, (from, to)| {
            assert!(text.contains(from), "{from}");
            text.replacen(from, to, 1)
        });
        let found = compare(&settings(RUNS), &settings(&text));
        found.settings.keys().map(|way| (way.join("."), found.is_now(way))).collect()
    }

    #[test]
    fn what_an_application_keeps_to_is_taken_up_at_once() {
        assert_eq!(differ(&[]), []);
        // Two that look alike.
        let list =
            |text: &str| settings(&format!("[[app]]\nname = \"shop\"\ndatabases = [{text}]\n"));
        assert_ne!(list("\"a, b\""), list("\"a\", \"b\""));
        let found = differ(&[("automatic = true", "automatic = false\nblock = \"1s\"")]);
        let now = |way: &str| (way.to_owned(), true);
        assert_eq!(found, [now("app.shop.failover.automatic"), now("app.shop.failover.block")]);
        assert_eq!(differ(&[("slots = true\n", "")]), [now("app.shop.slots")]);
        assert_eq!(differ(&[("operator", "admin")]), [now("control.token.ops.role")]);
    }

    #[test]
    fn what_was_checked_with_what_waits_waits_too() {
        let found =
            differ(&[("password=x", "password=y"), ("automatic = true", "automatic = false")]);
        let waits = |way: &str| (way.to_owned(), false);
        assert_eq!(
            found,
            [waits("app.shop.cell.a.conninfo"), waits("app.shop.failover.automatic")]
        );
        let found =
            differ(&[("127.0.0.1:1", "0.0.0.0:1"), ("operator", "admin"), ("slots = true\n", "")]);
        // Who may ask for what waits for nothing, but that anybody may.
        assert_eq!(found[2], ("control.token.ops.role".to_owned(), true));
        assert!(found.len() == 3 && found[..2].iter().all(|(_, now)| !now), "{found:?}");
        let tokens = "[[control.token]]\nname = \"ops\"\nrole = \"operator\"\n";
        let found = differ(&[("127.0.0.1:1", "0.0.0.0:1"), (tokens, "")]);
        assert!(found.iter().all(|(_, now)| !now), "{found:?}");
        // A plan may name what waits with another application.
        let plan = "name = \"billing\"\n[[app.plan]]\nname = \"p\"\n[[app.plan.step]]\nname = \"s\"\napp = \"shop\"\n";
        let found = differ(&[("password=x", "password=y"), ("name = \"billing\"\n", plan)]);
        assert!(found.len() == 5 && found.iter().all(|(_, now)| !now), "{found:?}");
        let leaves = plan.replace("app = \"shop\"", "leave = \"eu\"\nto = \"us\"");
        let found =
            differ(&[("password=x", "password=y"), ("name = \"billing\"\n", leaves.as_str())]);
        assert!(found.len() == 6 && found.iter().all(|(_, now)| !now), "{found:?}");
        let found = differ(&[("name = \"billing\"\n", plan)]);
        assert!(found.len() == 4 && found.iter().all(|(_, now)| *now), "{found:?}");
        let found = differ(&[
            ("name = \"billing\"\n", "name = \"billing\"\ndatabases = [\"b\"]\n"),
            ("slots = true\n", ""),
        ]);
        assert_eq!(found, [waits("app.billing.databases"), ("app.shop.slots".to_owned(), true)]);
    }

    #[test]
    fn what_may_be_a_secret_is_not_shown() {
        let way = |text: &str| text.split('.').map(str::to_owned).collect::<Way>();
        assert!(is_shown(&way("app.shop.failover.block")));
        for hidden in ["app.shop.cell.a.conninfo", "app.shop.plan.p.step", "control.token.ops.role"]
        {
            assert!(!is_shown(&way(hidden)), "{hidden}");
        }
    }
}
