use super::*;

const GOOD: &str = r#"
[proxy]
listen = ["127.0.0.1:6432"]
idle_timeout = "5m"

[[app]]
name = "shop"
databases = ["shop"]
auth = "trust"

[[app.cell]]
name = "a"
server = "127.0.0.1:5432"
active = true

[[app.cell]]
name = "b"
server = "127.0.0.1:5433"
"#;

#[test]
fn a_good_file_is_read() {
    let config = Roles::read(GOOD).unwrap().into_config().unwrap();
    assert_eq!(config.proxy.limits.idle_timeout, Duration::from_secs(300));
    assert_eq!(config.control.apps["shop"].first_active, "a");
    assert_eq!(config.api.listen.to_string(), "127.0.0.1:7432");
    let conninfo = &config.control.apps["shop"].cells["b"].conninfo;
    assert_eq!(conninfo, "host=127.0.0.1 port=5433 user=postgres dbname=postgres");
}

#[test]
fn a_proxy_has_a_file_of_its_own() {
    let elsewhere =
        "idle_timeout = \"5m\"\n[proxy.control]\nname = \"p2\"\naddress = \"127.0.0.1:7433\"";
    let text = GOOD.replace("idle_timeout = \"5m\"", elsewhere);
    let Ok(Roles::Proxy(remote)) = Roles::read(&text) else { panic!("no proxy") };
    assert_eq!((&*remote.name, remote.control[0].port, remote.proxy.apps.len()), ("p2", 7433, 1));
    let wrong = text.replace("\"p2\"", "\"p/2\"").replace("127.0.0.1:7433", "10.0.0.9:7433");
    let mistakes = Roles::read(&format!("{wrong}\n[control]\n")).unwrap_err();
    let shown: Vec<String> = mistakes.iter().map(|m| m.text.clone()).collect();
    assert_eq!(
        shown,
        [
            "between machines control is spoken to by TLS, which needs `cert`, `key` and `ca`",
            "`proxy.control.name` is made of letters, digits, `-`, `_` and `.`, it is `p/2`",
            "`[proxy.control]` says that control is elsewhere, so there is no `[control]` here",
        ],
        "{mistakes:?}"
    );
}

#[test]
fn every_mistake_is_named_with_its_line() {
    let text = r#"
[proxy]
listen = ["localhost"]
clients_max = 0
colour = "red"
login_timeout = "soon"

[control]
listen = "0.0.0.0:7432"

[[app]]
name = "shop"
auth = "kerberos"
sslmode = "allow"

[[app.cell]]
name = "a"
server = ":5432"
active = "yes"

[extra]
"#;
    let mistakes = Roles::read(text).unwrap_err();
    let shown: Vec<String> = mistakes.iter().map(|m| format!("{}: {}", m.line, m.text)).collect();
    assert_eq!(
        shown,
        [
            "3: `proxy.listen` must hold addresses such as \"127.0.0.1:6432\", `localhost` is none",
            "4: `proxy.clients_max` must be from 1 to 1000000, it is 0",
            "5: `proxy.colour` is unknown; known are admin_users, clients_max, connect_timeout, control, engines, \
             idle_timeout, keepalive_idle, keepalive_interval, listen, login_timeout, logins_max, \
             moves_at_once, tcp_user_timeout, tls",
            "6: `proxy.login_timeout` must be a duration such as \"500ms\", \"5s\" or \"2m\", it is `soon`",
            "9: `control.listen` is `0.0.0.0:7432`, which others can reach, so `token_file` or [[control.token]] is needed",
            "11: application `shop` has 0 cells with `active = true`, exactly 1 is needed",
            "11: application `shop` has 0 cells, at least 2 are needed",
            "13: `app.auth` must be one of scram, trust, file, it is `kerberos`",
            "14: `app.sslmode` must be one of disable, prefer, require, verify-ca, verify-full, it is `allow`",
            "18: `app.cell.server` must be `host:port` or `/socket/directory:port`, it is `:5432`",
            "19: `app.cell.active` must be true or false, it is a string",
            "21: `extra` is unknown; known are agent, app, control, proxy",
        ]
    );
}

#[test]
fn a_file_that_is_not_toml_names_its_line() {
    let mistakes = Roles::read("[proxy]\nlisten = [\n").unwrap_err();
    assert!(!mistakes.is_empty());
}

#[test]
fn durations_have_units() {
    assert_eq!(read_duration("500ms"), Some(Duration::from_millis(500)));
    assert_eq!(read_duration("2m"), Some(Duration::from_secs(120)));
    assert_eq!(read_duration("5"), None);
    assert_eq!(read_duration("s"), None);
    assert_eq!(read_duration("-1s"), None);
}

#[test]
fn a_node_of_control_has_a_file_of_its_own() {
    let cells = "\n[[app]]\nname = \"shop\"\nauth = \"trust\"\n[[app.cell]]\nname = \"a\"\nserver = \"127.0.0.1:1\"\nactive = true\nagent = true\n\
                 [[app.cell]]\nname = \"b\"\nserver = \"127.0.0.1:2\"\nagent = true\n";
    let etcd =
        "[control.agents]\n[control.etcd]\nnode = \"c1\"\nendpoints = \"http://127.0.0.1:2379/\"\n";
    let Ok(Roles::Node(node)) = Roles::read(&format!("{etcd}{cells}")) else { panic!("a node") };
    assert_eq!(node.node.etcd.endpoints, ["http://127.0.0.1:2379"]);
    assert_eq!((&*node.node.etcd.prefix, &*node.node.etcd.node), ("/holdfast/", "c1"));
    for (text, mistake) in [
        (
            "[proxy]\n[control.agents]\n[control.etcd]\nnode = \"c1\"\nendpoints = \"http://a:1\"\n",
            "no `[proxy]` here",
        ),
        ("[control.etcd]\nnode = \"c1\"\nendpoints = \"http://a:1\"\n", "needs `[control.agents]`"),
        (
            "[control.agents]\n[control.etcd]\nnode = \"c/1\"\nendpoints = \"http://a:1\"\n",
            "is made of letters",
        ),
        ("[control.agents]\n[control.etcd]\nnode = \"c1\"\nendpoints = []\n", "names each member"),
        (
            "[control.agents]\n[control.etcd]\nnode = \"c1\"\nendpoints = \"https://a:1\"\n",
            "needs `ca`",
        ),
        ("[control.agents]\n[control.etcd]\nnode = \"c1\"\nendpoints = \"a:1\"\n", "is none"),
        (
            "[control.agents]\n[control.etcd]\nnode = \"c1\"\nendpoints = \"http://a:1\"\nlease = \"5ms\"\n",
            "between 1s and 60s",
        ),
        (
            "[control.agents]\n[control.etcd]\nnode = \"c1\"\nendpoints = \"http://a:1\"\nuser = \"u\"\n",
            "go together",
        ),
        (
            "[control.agents]\n[control.etcd]\nnode = \"c1\"\nendpoints = \"http://a:1\"\nprefix = \"x\"\n",
            "begins and ends with `/`",
        ),
    ] {
        let mistakes = Roles::read(&format!("{text}{cells}")).unwrap_err();
        let shown: Vec<&str> = mistakes.iter().map(|mistake| &*mistake.text).collect();
        assert!(shown.iter().any(|text| text.contains(mistake)), "{mistake}: {shown:?}");
    }
}

/// Plans of an application with two cells.
fn with_plans(plans: &str) -> String {
    format!(
        "[[app]]\nname = \"shop\"\nauth = \"trust\"\n\
         [[app.cell]]\nname = \"a\"\nserver = \"127.0.0.1:1\"\nactive = true\n\
         [[app.cell]]\nname = \"b\"\nserver = \"127.0.0.1:2\"\n{plans}"
    )
}

#[test]
fn a_plan_is_read_with_its_child_plans() {
    let text = with_plans(
        r#"
[[app.plan]]
name = "announce"
[[app.plan.step]]
name = "hook"
http = { url = "https://example.org/x" }
tries = 3
undo = { exec = ["/bin/true"] }
[[app.plan]]
name = "to-b"
on_failure = "undo"
objective = "30s"
[[app.plan.step]]
name = "first"
plan = "announce"
[[app.plan.step]]
name = "both"
parallel = [{ name = "x", steps = [{ name = "y", wait = "1s" }] }, { name = "z", sql = "SELECT 1" }]
[[app.plan.step]]
name = "switch"
activate = "b"
undo = { back = true }
only_if = [{ cell = "b", is = "passive" }]
"#,
    );
    let Roles::Here(config) = Roles::read(&text).unwrap() else { panic!() };
    let settings = config.control.apps["shop"].now();
    let plan = &settings.plans["to-b"];
    let names: Vec<&str> = plan.all_steps().iter().map(|step| step.name.as_str()).collect();
    assert_eq!(names, ["first", "first/hook", "both", "both/x", "both/x/y", "both/z", "switch"]);
    assert_eq!(plan.step("first/hook").unwrap().tries, 3);
    assert_eq!(plan.objective_ms, Some(30_000));
}

/// An application with a cell in each of these regions; the first is active.
fn app_in(name: &str, regions: &[&str], needs: &str) -> String {
    let cells = regions.iter().enumerate().map(|(at, region)| {
        format!(
            "[[app.cell]]\nname = \"c{at}\"\nserver = \"127.0.0.1:{}\"\nregion = \"{region}\"\nactive = {}\n",
            at + 1,
            at == 0
        )
    });
    format!(
        "[[app]]\nname = \"{name}\"\nauth = \"trust\"\ndatabases = [\"{name}\"]\ndepends_on = [{needs}]\n{}",
        cells.collect::<String>()
    )
}

const LEAVE: &str = "[[app.plan]]\nname = \"out\"\n[[app.plan.step]]\nname = \"go\"\nleave = \"eu/1\"\nto = \"eu/2\"\n\
                     undo = { back = true }\n";

#[test]
fn whoever_leaves_a_region_goes_after_what_he_needs() {
    let all = [
        app_in("shop", &["eu/1/a", "eu/1/b", "eu/2"], "\"ledger\", \"mail\""),
        LEAVE.into(),
        app_in("ledger", &["eu/1", "eu/2/a"], ""),
        app_in("mail", &["eu/1", "eu/2"], ""),
        app_in("far", &["us", "eu/2"], "\"shop\""),
    ];
    let Roles::Here(config) = Roles::read(&all.concat()).unwrap() else { panic!() };
    let settings = config.control.apps["shop"].now();
    let plan = &settings.plans["out"];
    let names: Vec<&str> = plan.all_steps().iter().map(|step| step.name.as_str()).collect();
    let expected =
        ["go", "go/group-1", "go/ledger", "go/mail", "go/group-2", "go/shop.c0", "go/shop.c1"];
    assert_eq!(names, expected);
    let step = plan.step("go/shop.c1").unwrap();
    assert!(step.says().contains("`eu/2` of `shop` becomes active"), "{}", step.says());
    assert_eq!((&*step.only_if[0].cell, step.undo.is_some()), ("c1", true));
}

#[test]
fn mistakes_about_regions_are_named() {
    let shop = |regions: &[&str], needs: &str| app_in("shop", regions, needs);
    let ledger = app_in("ledger", &["eu/1", "us"], "\"shop\"");
    for (text, expected) in [
        (shop(&["eu//1", "us"], ""), "a region is such as \"eu/frankfurt/a\""),
        (shop(&["c1", "us"], ""), "`c1` is a cell, and a region in which cell `c0` is"),
        (shop(&["eu", "us"], "\"mail\""), "there is no application `mail`; there are shop"),
        (
            shop(&["eu", "us"], "\"ledger\"") + &ledger,
            "leads back to itself: `ledger` -> `shop` -> `ledger`",
        ),
        (shop(&["eu/1", "us"], "") + LEAVE, "has cells in `eu/1`, and none in `eu/2`"),
        (shop(&["us/1", "us/2"], "") + LEAVE, "no application has a cell in `eu/1`"),
        (
            shop(&["eu/1", "us"], "") + &LEAVE.replace("\"eu/2\"", "\"eu/1/b\""),
            "`eu/1/b` is in `eu/1`, which is to be left",
        ),
        (
            shop(&["eu/1", "us"], "") + &LEAVE.replace("\"eu/2\"", "\"eu\""),
            "`eu/1`, which is to be left, is in `eu`: name a region beside it",
        ),
        (
            shop(&["eu/1", "eu/2"], "") + &LEAVE.replace("back = true", "activate = \"c0\""),
            "it is undone by `back` alone",
        ),
        (
            shop(&["eu/1", "us"], "") + &LEAVE.replace("to = \"eu/2\"\n", ""),
            "`app.plan.step.to` is missing",
        ),
    ] {
        let mistakes = Roles::read(&text).unwrap_err();
        let shown: Vec<&str> = mistakes.iter().map(|mistake| &*mistake.text).collect();
        assert!(shown.iter().any(|text| text.contains(expected)), "{expected}: {shown:?}");
    }
}

/// Neither by their depth nor by their number do plans grow without end.
#[test]
fn plans_of_plans_are_bounded() {
    let steps = |child: &str, count: usize| -> String {
        (0..count)
            .map(|n| format!("[[app.plan.step]]\nname = \"s{n}\"\nplan = \"{child}\"\n"))
            .collect()
    };
    let many = |count: usize, wide: usize| {
        let mut text = String::new();
        for n in 0..count {
            text += &format!("[[app.plan]]\nname = \"p{n}\"\n");
            text += &steps(&format!("p{}", n + 1), wide);
        }
        text += &format!("[[app.plan]]\nname = \"p{count}\"\n");
        text + "[[app.plan.step]]\nname = \"x\"\nwait = \"1s\"\n"
    };
    assert!(Roles::read(&with_plans(&many(7, 1))).is_ok());
    for (count, wide, expected) in
        [(50, 1, "nested deeper than 8"), (24, 2, "nested deeper"), (2, 20, "more than 200 steps")]
    {
        let mistakes = Roles::read(&with_plans(&many(count, wide))).unwrap_err();
        assert!(mistakes.iter().any(|m| m.text.contains(expected)), "{count} {wide}");
    }
}

#[test]
fn mistakes_in_plans_are_named() {
    let text = with_plans(
        r#"
[[app.plan]]
name = "one"
[[app.plan.step]]
name = "to the other"
plan = "two"
[[app.plan]]
name = "two"
[[app.plan.step]]
name = "back"
plan = "one"
[[app.plan.step]]
name = "x"
wait = "1s"
exec = ["/bin/true"]
[[app.plan.step]]
name = "hook"
http = { url = "http://me:secret@host/" }
deadline = "1s"
[[app.plan.step]]
name = "hook"
activate = "c"
[[app.plan.step]]
name = "go"
approval = "other"
[[app.plan.step]]
name = "w"
wait = "1s"
undo = { back = true }
"#,
    );
    let mistakes = Roles::read(&text).unwrap_err();
    let shown: Vec<String> = mistakes.iter().map(|m| format!("{}: {}", m.line, m.text)).collect();
    let expected = [
        "the name `to the other` must consist of at most 64 letters, digits, `-`, `_` and `.`",
        "plans lead back to themselves: `one` -> `two` -> `one`",
        "plans lead back to themselves: `two` -> `one` -> `two`",
        "step `x` must have exactly one of",
        "it has exec, wait",
        "`url` has a user in it",
        "`app.plan.step.deadline` is unknown",
        "plan `two` has two steps `hook`",
        "application `shop` has no cell `c`; its cells are a, b",
        "`approval = \"other\"` needs [[control.token]]",
        "`undo.back` is for `activate` and `fence`",
    ];
    for text in expected {
        assert!(shown.iter().any(|line| line.contains(text)), "{text}: {shown:#?}");
    }
    assert!(!shown.iter().any(|line| line.contains("secret")), "{shown:#?}");
}

#[test]
fn alarms_are_read_and_their_mistakes_named() {
    let text = with_plans(
        "[[app.alarm]]\nname = \"health\"\nhttp = { url = \"http://127.0.0.1:1/health\" }\n\
         every = \"2s\"\nred_after = 5\nunanswered = \"red\"\n\
         [[app.alarm]]\nname = \"rows\"\nsql = \"SELECT true\"\ndatabase = \"shop\"\n\
         [[app.plan]]\nname = \"p\"\n[[app.plan.trigger]]\nalarms = [\"health\", \"rows\"]\n\
         [[app.plan.step]]\nname = \"s\"\nexec = [\"/bin/true\"]\n",
    );
    let Roles::Here(config) = Roles::read(&text).unwrap() else { panic!() };
    let settings = config.control.apps["shop"].now();
    let alarm = &settings.alarms["health"];
    assert_eq!((alarm.every_ms, alarm.red_after, alarm.green_after), (2_000, 5, 2));
    assert!(alarm.is_red_unanswered && !settings.alarms["rows"].is_red_unanswered);
    assert!(matches!(&alarm.check, model::plan::Action::Http(http) if http.method == "GET"));
    assert_eq!(settings.plans["p"].triggers[0].alarms.len(), 2);

    let text = with_plans(
        "[[app.alarm]]\nname = \"x\"\nhttp = { url = \"http://127.0.0.1:1/\" }\nexec = [\"/bin/true\"]\n\
         [[app.alarm]]\nname = \"y\"\nsql = \"SELECT true\"\ncell = \"nowhere\"\nevery = \"1ms\"\n\
         [[app.alarm]]\nname = \"y\"\nsql = \"SELECT true\"\napp = \"other\"\nred_after = 0\n\
         [[app.plan]]\nname = \"p\"\n[[app.plan.trigger]]\nalarms = [\"z\"]\n\
         [[app.plan.trigger]]\nafter = \"1s\"\n\
         [[app.plan.step]]\nname = \"s\"\nexec = [\"/bin/true\"]\n",
    );
    let mistakes = Roles::read(&text).unwrap_err();
    let shown: Vec<String> = mistakes.iter().map(|m| format!("{}: {}", m.line, m.text)).collect();
    for mistake in [
        "alarm `x` asks one of http, exec, sql; found http, exec",
        "alarm `y` names a cell `nowhere` that is not there",
        "`every` is at least 100ms, it is 1ms",
        "alarm `y` of `shop` cannot ask a server of `other`",
        "alarm `y` is there twice",
        "plan `p` begins by an alarm `z` that is not there",
        "or `alarms` that are red",
    ] {
        assert!(shown.iter().any(|line| line.contains(mistake)), "{mistake}: {shown:#?}");
    }
}
