//! Settings of servers that a failover or a rejoin hangs on.

use std::collections::BTreeMap;

/// What is asked of a server, from `pg_settings`; sizes and times in the units of `setting`.
pub const ASKED: [&str; 7] = [
    "wal_retrieve_retry_interval",
    "recovery_target_timeline",
    "wal_log_hints",
    "data_checksums",
    "full_page_writes",
    "wal_receiver_timeout",
    "max_slot_wal_keep_size",
];

/// A setting as a server has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    pub value: String,
    /// Nobody has chosen it.
    pub is_default: bool,
}

/// A setting that is in the way of something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What it has, and what comes of it.
    pub says: String,
    /// What a reload could make of it, by which name.
    pub to: Option<(&'static str, &'static str)>,
    /// Nobody has chosen what it is, so Holdfast may.
    pub is_default: bool,
}

/// What is in the way on a server. `has_slots`: slots keep WAL for standbys.
pub fn check(settings: &BTreeMap<String, Setting>, has_slots: bool) -> Vec<Finding> {
    let text = |name: &str| settings.get(name).map(|setting| setting.value.as_str());
    let number = |name: &str| text(name).and_then(|text| text.parse::<i64>().ok());
    let is_default = |name: &str| settings.get(name).is_some_and(|setting| setting.is_default);
    let mut found = Vec::new();
    let mut find = |name: &'static str, to: Option<&'static str>, says: String| {
        let to = to.map(|to| (name, to));
        found.push(Finding { says, to, is_default: is_default(name) });
    };
    if let Some(ms) = number("wal_retrieve_retry_interval").filter(|ms| *ms > 250) {
        let says = format!(
            "`wal_retrieve_retry_interval` is {ms} ms, and a promotion may take as long: 100 ms is better"
        );
        find("wal_retrieve_retry_interval", Some("100ms"), says);
    }
    if let Some(target) = text("recovery_target_timeline").filter(|target| *target != "latest") {
        let says = format!(
            "`recovery_target_timeline` is `{target}`, and it follows no new primary: `latest` and a restart are needed"
        );
        find("recovery_target_timeline", None, says);
    }
    let is_off = |name: &str| text(name) == Some("off");
    if is_off("wal_log_hints") && is_off("data_checksums") {
        let says = "`wal_log_hints` and `data_checksums` are off, so once lost it is copied anew and not rewound: `wal_log_hints = on` and a restart are needed";
        find("wal_log_hints", None, says.into());
    }
    if is_off("full_page_writes") {
        let says = "`full_page_writes` is off, and it cannot be rewound: `on` is needed".to_owned();
        find("full_page_writes", None, says);
    }
    if number("wal_receiver_timeout") == Some(0) {
        let says = "`wal_receiver_timeout` is 0, and a primary that is silent is waited for without end: 60 s is usual";
        find("wal_receiver_timeout", None, says.into());
    }
    if has_slots && number("max_slot_wal_keep_size").is_none_or(|size| size < 0) {
        let says = "`max_slot_wal_keep_size` has no limit, and a standby that is gone would fill the disk: there are no slots until it has one";
        find("max_slot_wal_keep_size", None, says.into());
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(of: &[(&str, &str)]) -> BTreeMap<String, Setting> {
        let setting = |&(name, value): &(&str, &str)| {
            let setting =
                Setting { value: value.to_owned(), is_default: name.starts_with("wal_r") };
            (name.to_owned(), setting)
        };
        of.iter().map(setting).collect()
    }

    #[test]
    fn what_is_in_the_way_is_found() {
        let good = [
            ("wal_retrieve_retry_interval", "100"),
            ("recovery_target_timeline", "latest"),
            ("wal_log_hints", "off"),
            ("data_checksums", "on"),
            ("full_page_writes", "on"),
            ("wal_receiver_timeout", "60000"),
            ("max_slot_wal_keep_size", "16384"),
        ];
        assert_eq!(check(&settings(&good), true), []);
        let bad = [
            ("wal_retrieve_retry_interval", "5000"),
            ("recovery_target_timeline", "current"),
            ("wal_log_hints", "off"),
            ("data_checksums", "off"),
            ("full_page_writes", "off"),
            ("wal_receiver_timeout", "0"),
            ("max_slot_wal_keep_size", "-1"),
        ];
        assert_eq!(check(&settings(&bad), true).len(), 6);
        assert_eq!(check(&settings(&bad), false).len(), 5);
        let found = check(&settings(&bad[..1]), false);
        assert_eq!(found[0].to, Some(("wal_retrieve_retry_interval", "100ms")));
        assert!(found[0].is_default && found[0].says.contains("5000 ms"));
        for (name, _) in good {
            assert!(ASKED.contains(&name), "{name}");
        }
    }
}
