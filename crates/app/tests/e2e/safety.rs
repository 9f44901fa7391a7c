//! Safety rules on real servers: looked at when a change begins and at its point of no return, and gone on in spite of by name.

use crate::plans::plan;
use crate::support::{Installation, run, shown, value};

const RULES: &str = r#"
[[app.safety]]
name = "window"
for = ["switchover"]
require = { gate = "patch-day" }

[[app.safety]]
name = "one-writes"
require = { at_least = 1, of = ["a", "b"], is = "active" }
"#;

#[tokio::test]
async fn a_rule_is_in_the_way_until_its_gate_is_open_or_somebody_says_why_not() {
    let mut installation = Installation::start("safety");
    plan(&mut installation, RULES);
    let mut client = installation.connect().await;
    run(&mut client, "SET work_mem = '7MB'").await;
    let listed = shown(&installation.holdfast(&["safety", "shop"]));
    assert!(listed.contains("gate patch-day open") && listed.contains("closed"), "{listed}");
    let dry = installation.holdfast(&["switchover", "shop", "--to", "b", "--dry-run"]);
    let text = shown(&dry);
    assert!(!dry.status.success() && text.contains("gate `patch-day` is closed"), "{text}");
    let refused = shown(&installation.holdfast(&["switchover", "shop", "--to", "b"]));
    assert!(refused.contains("safety rule `window`: gate `patch-day` is closed"), "{refused}");
    let refused = shown(&installation.holdfast(&["fence", "shop", "a"]));
    assert!(refused.contains("0 of a, b would be active, at least 1 must be"), "{refused}");
    assert_eq!(shown(&installation.holdfast(&["executions"])).lines().count(), 1);

    let wrong = shown(&installation.holdfast(&["gate", "shop", "patchday", "open"]));
    assert!(wrong.contains("has no gate `patchday`; its rules name patch-day"), "{wrong}");
    let _ = installation.holdfast(&["gate", "shop", "patch-day", "open"]);
    // It is closed again before the point of no return.
    let mut busy = installation.connect().await;
    run(&mut busy, "BEGIN").await;
    let switch = installation.switch_until_it_holds().await;
    let _ = installation.holdfast(&["gate", "shop", "patch-day", "close", "--reason", "not now"]);
    run(&mut busy, "COMMIT").await;
    let text = shown(&switch.await.unwrap());
    assert!(text.contains("aborted, nothing changed"), "{text}");
    assert!(text.contains("reason: grant: safety rule `window`"), "{text}");
    assert_eq!(installation.active(), "a");
    run(&mut client, "CREATE TABLE t ()").await;

    let args = ["switchover", "shop", "--to", "b", "--override", "window"];
    let refused = shown(&installation.holdfast(&args));
    assert!(refused.contains("only for a `--reason`"), "{refused}");
    let wrong = shown(&installation.holdfast(&["fence", "shop", "a", "--override", "x"]));
    assert!(wrong.contains("has no safety rule `x`; its rules are window, one-writes"), "{wrong}");
    let done = installation.holdfast(&[&args[..], &["--reason", "the disk fails"]].concat());
    assert!(done.status.success(), "{}", shown(&done));
    assert_eq!(installation.active(), "b");
    assert_eq!(value(&mut client, "SHOW work_mem").await, "7MB");
    let audit = shown(&installation.holdfast(&["audit"]));
    assert!(audit.contains("in spite of `window`") && audit.contains("the disk fails"), "{audit}");
    assert!(audit.contains("gate `patch-day` is closed") && audit.contains("not now"), "{audit}");
    let api = installation.facts.api.clone();
    let metrics = tokio::task::spawn_blocking(move || {
        ureq::get(format!("{api}/metrics")).call().unwrap().body_mut().read_to_string().unwrap()
    });
    let metrics = metrics.await.unwrap();
    let line = "holdfast_safety_rule_override_total{app=\"shop\",rule=\"window\"} 1";
    assert!(metrics.contains(line), "{metrics}");
    // A fence is refused at its begin; what it would have been in the way of was never begun.
    let fence = ["fence", "shop", "b", "--override", "one-writes", "--reason", "drill"];
    assert!(installation.holdfast(&fence).status.success());
}
