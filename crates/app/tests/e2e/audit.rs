//! Who changed what, and why: recorded with the change, by the name of a token, and never twice for one key.

use std::process::Output;

use store::embedded::EmbeddedStore;
use store::{Store, Txn};

use crate::support::{Installation, shown, signal};

/// An operator, an administrator, and nothing for anybody else.
fn with_tokens(installation: &mut Installation) {
    let mut tokens = String::new();
    for (name, role) in [("alice", "operator"), ("root", "admin"), ("eve", "viewer")] {
        let file = installation.dir.join(name);
        std::fs::write(&file, format!("{name}-secret\n")).unwrap();
        tokens.push_str(&format!(
            "[[control.token]]\nname = \"{name}\"\nrole = \"{role}\"\nfile = \"{}\"\n\n",
            file.display()
        ));
    }
    installation.reconfigure(|text| {
        text.replacen("state_dir", "private = true\nstate_dir", 1).replacen(
            "[[app]]",
            &format!("{tokens}[[app]]"),
            1,
        )
    });
}

fn holdfast(installation: &Installation, who: &str, args: &[&str]) -> Output {
    let file = installation.dir.join(who);
    let args = [&["--token-file", file.to_str().unwrap()], args].concat();
    installation.holdfast(&args)
}

#[tokio::test]
async fn each_change_is_recorded_with_whoever_made_it() {
    let mut installation = Installation::start("audit");
    with_tokens(&mut installation);
    let by = |who: &str, args: &[&str]| holdfast(&installation, who, args);
    // Whoever is nobody, or may not.
    let refused = installation.holdfast(&["status"]);
    assert!(shown(&refused).contains("a bearer token is needed"), "{}", shown(&refused));
    assert!(by("eve", &["status"]).status.success());
    let refused = by("eve", &["switchover", "shop", "--to", "b"]);
    assert!(
        shown(&refused).contains("`eve` is viewer, this takes operator"),
        "{}",
        shown(&refused)
    );
    let refused = by("alice", &["failover", "shop", "--to", "b", "--allow-data-loss"]);
    assert!(shown(&refused).contains("this takes admin"), "{}", shown(&refused));
    // A condition that does not hold.
    let switch = ["switchover", "shop", "--to", "b"];
    let refused = by("alice", &[&switch[..], &["--if-epoch", "7"]].concat());
    assert!(shown(&refused).contains("is in epoch 1, not 7"), "{}", shown(&refused));
    let why = ["--key", "k1", "--reason", "patch day, as agreed: ü"];
    let done = by("alice", &[&switch[..], &why, &["--if-epoch", "1"]].concat());
    assert!(shown(&done).contains("execution 1"), "{}", shown(&done));
    assert!(done.status.success(), "{}", shown(&done));
    // Asked again, it is not done again.
    let again = by("alice", &[&switch[..], &["--key", "k1"]].concat());
    assert_eq!(shown(&again), shown(&done));
    let other = by("alice", &["switchover", "shop", "--to", "a", "--key", "k1"]);
    assert!(shown(&other).contains("was used for another request"), "{}", shown(&other));
    let done = by("root", &["switchover", "shop", "--to", "a"]);
    assert!(done.status.success(), "{}", shown(&done));
    let audit = by("eve", &["audit"]);
    let text = shown(&audit);
    let lines: Vec<&str> = text.lines().collect();
    let has =
        |words: &[&str]| lines.iter().any(|line| words.iter().all(|word| line.contains(word)));
    assert!(has(&["holdfast", "create", "it is configured"]), "{text}");
    assert!(has(&["alice", "switchover", "from `a` to `b`", "patch day, as agreed: ü"]), "{text}");
    assert!(has(&["alice", "end", " 2 ", "execution 1", "completed"]), "{text}");
    assert!(has(&["root", "end", " 3 ", "execution 2", "completed"]), "{text}");
    assert!(audit.status.success() && text.contains("each as it was written"), "{text}");
    assert!(!text.contains("secret"), "{text}");

    // Somebody changes what was written, past Holdfast.
    signal(installation.pid(), "KILL");
    installation.wait_crashed();
    {
        let store = EmbeddedStore::open(&installation.dir.join("state")).unwrap();
        let all = store.list("audit/").unwrap();
        let (key, found) =
            all.iter().find(|(_, found)| found.value.windows(5).any(|w| w == b"alice")).unwrap();
        let text = String::from_utf8(found.value.clone()).unwrap();
        store
            .commit(&Txn::default().put(key, text.replace("alice", "mallory").into_bytes()))
            .unwrap();
    }
    installation.restart(&[]);
    let audit = holdfast(&installation, "eve", &["audit"]);
    assert!(!audit.status.success(), "{}", shown(&audit));
    assert!(shown(&audit).contains("record 2 was changed"), "{}", shown(&audit));
}
