#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use proptest::prelude::*;

use super::*;
use crate::cell::Application;
use crate::plan::{Condition, Http};
use crate::switchover::OnTimeout;

const APP: &str = "shop";

fn step(name: &str, what: What) -> Step {
    let (only_if, mode, undo) = Default::default();
    let (tries, pause_ms, timeout_ms) = (1, 0, 60_000);
    let name = name.to_owned();
    Step { name, what, only_if, mode, tries, pause_ms, timeout_ms, undo, idempotent: false }
}

fn http(name: &str) -> Action {
    let url = format!("http://127.0.0.1/{name}");
    Action::Http(Http { method: "POST".into(), url, body: None, token_file: None })
}

fn call(name: &str) -> Step {
    step(name, What::Do(http(name)))
}

fn undone(name: &str) -> Step {
    Step { undo: Some(Undo::Do(http(&format!("undo-{name}")))), ..call(name) }
}

fn activate(to: &str) -> Action {
    let (app, to) = (APP.to_owned(), to.to_owned());
    let on_timeout = OnTimeout::Abort;
    Action::Activate { app, to, deadline_ms: 1_000, on_timeout, allow_data_loss: false }
}

fn of(steps: Vec<Step>) -> PlanExecution {
    let plan = Plan {
        name: "p".into(),
        steps,
        on_failure: OnFailure::Stop,
        objective_ms: None,
        triggers: Vec::new(),
    };
    PlanExecution {
        id: 1,
        app: APP.into(),
        plan,
        mode: Mode::Graceful,
        nonce: "n".into(),
        is_drill: false,
        is_triggered: false,
        asked: Asking { by: "alice".into(), ..Asking::default() },
        started_at_ms: 1_000,
        ended_at_ms: None,
        steps: BTreeMap::new(),
        is_paused: false,
        goes_back: false,
        reason: None,
        ending: None,
    }
}

fn world() -> World {
    let application = Application::new("a", ["a".to_owned(), "b".to_owned()]);
    World::from([(APP.to_owned(), application)])
}

/// What is to be done now, in short.
fn shown(deeds: &[Deed]) -> Vec<String> {
    let one = |deed: &Deed| match deed {
        Deed::GoBack(_) => "back".to_owned(),
        Deed::End(ending) => ending.name().to_owned(),
        Deed::Step { step, event, .. } => format!("{} {step}", asked(event)),
    };
    deeds.iter().map(one).collect()
}

/// Does what is to be done, and has steps that begin end as `outcome` says, until nothing is left to do. Gives what was done.
fn drive(
    execution: &mut PlanExecution,
    mut outcome: impl FnMut(&str) -> Outcome,
    now_ms: &mut u64,
) -> Vec<String> {
    let mut done = Vec::new();
    loop {
        let deeds = execution.next(&world(), *now_ms);
        if deeds.is_empty() {
            return done;
        }
        done.extend(shown(&deeds));
        for deed in deeds {
            *now_ms += 1;
            match deed {
                Deed::GoBack(why) => execution.cancel(why).unwrap(),
                Deed::End(ending) => execution.end(ending, *now_ms),
                Deed::Step { step, event, action } => {
                    execution.on(&step, &event, *now_ms, &world()).unwrap();
                    if action.is_some() {
                        let ended = Event::Ended(outcome(&step));
                        execution.on(&step, &ended, *now_ms, &world()).unwrap();
                    }
                }
            }
        }
    }
}

fn all_done(_: &str) -> Outcome {
    Outcome::Done(String::new())
}

#[test]
fn steps_come_one_after_the_other_and_at_the_same_time() {
    let group = step("g", What::Parallel(vec![call("g/x"), call("g/y")]));
    let mut execution = of(vec![call("first"), group, call("last")]);
    let done = drive(&mut execution, all_done, &mut 1_000);
    assert_eq!(
        done,
        ["begun first", "begun g", "begun g/x", "begun g/y", "ended g", "begun last", "completed"]
    );
}

#[test]
fn what_fails_stands_still_until_somebody_says_what_becomes_of_it() {
    let fails = |name: &str| match name {
        "b" => Outcome::Failed("no".into()),
        _ => all_done(name),
    };
    let mut execution = of(vec![call("a"), Step { tries: 3, ..call("b") }, call("c")]);
    let mut now = 1_000;
    let done = drive(&mut execution, fails, &mut now);
    assert_eq!(done, ["begun a", "begun b", "begun b", "begun b"]);
    assert_eq!((execution.stuck(), execution.progress("b").tries), (vec!["b"], 3));
    assert!(execution.resolve("c", &Event::Skip("x".into()), now).is_err());
    execution.resolve("b", &Event::Retry, now).unwrap();
    assert_eq!(drive(&mut execution, fails, &mut now).len(), 3, "it has its tries anew");
    execution.resolve("b", &Event::Skip("by alice".into()), now).unwrap();
    assert_eq!(drive(&mut execution, fails, &mut now), ["begun c", "completed"]);
}

#[test]
fn what_may_have_been_done_is_not_done_again_by_itself() {
    let lost = |_: &str| Outcome::Unknown("no answer".into());
    let mut execution = of(vec![Step { tries: 5, ..call("a") }]);
    assert_eq!(drive(&mut execution, lost, &mut 1_000), ["begun a"]);
    assert_eq!(execution.stuck(), ["a"]);
    let mut execution = of(vec![Step { tries: 5, idempotent: true, ..call("a") }]);
    assert_eq!(drive(&mut execution, lost, &mut 1_000).len(), 5);
    // So it is with what is found running after a crash.
    let mut execution = of(vec![call("a"), step("s", What::Do(activate("b")))]);
    execution.on("a", &Event::Begin, 1_000, &world()).unwrap();
    let steps = execution.plan.steps.clone();
    let found = |step: &Step, now_ms| execution.found(step, &http("a"), now_ms);
    // It may run to its time limit, whoever has begun it.
    assert_eq!(found(&steps[0], 2_000), Found::Wait);
    let over = 1_000 + 60_000 + LATE_MS;
    assert!(matches!(found(&steps[0], over), Found::Lost(Outcome::Unknown(_))));
    let again = Step { idempotent: true, ..steps[0].clone() };
    assert_eq!((found(&again, 2_000), found(&again, over)), (Found::Wait, Found::Again));
    let switch = execution.found(&steps[1], &activate("b"), 2_000);
    assert_eq!(switch, Found::Again, "the store knows what became of it");
}

#[test]
fn what_was_done_last_is_undone_first() {
    let fails = |name: &str| match name {
        "d" => Outcome::NotDone("refused".into()),
        _ => all_done(name),
    };
    let mut execution = of(vec![undone("a"), call("b"), undone("c"), undone("d")]);
    execution.plan.on_failure = OnFailure::Undo;
    let done = drive(&mut execution, fails, &mut 1_000);
    assert_eq!(
        done,
        [
            "begun a",
            "begun b",
            "begun c",
            "begun d",
            "back",
            "undone c",
            "undone a",
            "undone in part"
        ]
    );
    assert_eq!(execution.left(), ["b"], "nothing says how that is undone");
    // Where it may have done a part, it is undone as well.
    let half = |name: &str| match name {
        "d" => Outcome::Failed("half".into()),
        _ => all_done(name),
    };
    let mut execution = of(vec![undone("a"), undone("d")]);
    execution.plan.on_failure = OnFailure::Undo;
    let done = drive(&mut execution, half, &mut 1_000);
    assert_eq!(done[2..], ["back", "undone d"]);
    assert_eq!(execution.stuck(), ["d"], "its undoing has failed too");
    execution.resolve("d", &Event::Skip("by hand".into()), 9_000).unwrap();
    assert_eq!(drive(&mut execution, all_done, &mut 9_000), ["undone a", "undone in part"]);
}

#[test]
fn a_drill_leaves_what_it_found() {
    let mut execution = of(vec![undone("a"), step("s", What::Do(activate("b")))]);
    execution.is_drill = true;
    let mut undo = Vec::new();
    let mut now = 1_000;
    loop {
        let deeds = execution.next(&world(), now);
        if deeds.is_empty() {
            break;
        }
        for deed in deeds {
            now += 1;
            match deed {
                Deed::GoBack(why) => execution.cancel(why).unwrap(),
                Deed::End(ending) => execution.end(ending, now),
                Deed::Step { step, event, action } => {
                    execution.on(&step, &event, now, &world()).unwrap();
                    if event == Event::Undo {
                        undo.push(action.unwrap().says());
                    }
                    execution.on(&step, &Event::Ended(all_done("")), now, &world()).unwrap();
                }
            }
        }
    }
    assert_eq!(undo, ["`a` of `shop` becomes active", "POST http://127.0.0.1/undo-a"]);
    assert_eq!(execution.ending, Some(PlanEnding::Undone));
}

#[test]
fn what_one_try_may_have_done_another_does_not_take_back() {
    let mut execution = of(vec![undone("a")]);
    let said = |outcome: Outcome| (Event::Begin, Event::Ended(outcome));
    for (begin, ended) in
        [said(Outcome::Failed("500".into())), said(Outcome::NotDone("nobody is there".into()))]
    {
        execution.on("a", &begin, 1_000, &world()).unwrap();
        execution.on("a", &ended, 1_000, &world()).unwrap();
        execution.resolve("a", &Event::Retry, 1_000).unwrap();
    }
    execution.cancel("enough".into()).unwrap();
    assert_eq!(drive(&mut execution, all_done, &mut 2_000), ["undone a", "undone"]);
    // What was so already is left so.
    let mut execution = of(vec![undone("a")]);
    execution.is_drill = true;
    let done = drive(&mut execution, |_| Outcome::Already("it is".into()), &mut 1_000);
    assert_eq!(done, ["begun a", "back", "undone"]);
}

#[test]
fn keys_stay_where_nobody_knows_what_became_of_the_last() {
    let mut execution = of(vec![Step { idempotent: true, tries: 9, ..call("a") }]);
    let mut keys = Vec::new();
    for outcome in [
        Outcome::Unknown("late".into()),
        Outcome::Unknown("late".into()),
        Outcome::Failed("400".into()),
        Outcome::Done(String::new()),
    ] {
        execution.on("a", &Event::Begin, 1_000, &world()).unwrap();
        keys.push(execution.key_of("a"));
        execution.on("a", &Event::Ended(outcome), 1_000, &world()).unwrap();
    }
    assert_eq!(keys, ["plan:n/a/do/0", "plan:n/a/do/0", "plan:n/a/do/0", "plan:n/a/do/1"]);
}

#[test]
fn the_cell_that_was_active_is_that_of_the_first_try() {
    let mut execution = of(vec![step("s", What::Do(activate("b")))]);
    execution.is_drill = true;
    execution.on("s", &Event::Begin, 1_000, &world()).unwrap();
    execution.on("s", &Event::Ended(Outcome::Unknown("?".into())), 1_000, &world()).unwrap();
    execution.resolve("s", &Event::Retry, 1_000).unwrap();
    let after =
        World::from([(APP.to_owned(), Application::new("b", ["a", "b"].map(str::to_owned)))]);
    execution.on("s", &Event::Begin, 1_000, &after).unwrap();
    execution.on("s", &Event::Ended(Outcome::Already("it is".into())), 1_000, &after).unwrap();
    let undo = execution.undo_of(&execution.plan.steps[0]).unwrap();
    assert_eq!(undo.says(), "`a` of `shop` becomes active");
    assert!(matches!(&execution.next(&after, 1_000)[..], [Deed::GoBack(_)]));
}

#[test]
fn waits_end_by_the_clock_and_at_once_when_it_goes_back() {
    let mut execution = of(vec![step("w", What::Do(Action::Wait { ms: 36_000_000 }))]);
    assert_eq!(drive(&mut execution, all_done, &mut 1_000), ["begun w"]);
    assert!(execution.next(&world(), 36_000_000).is_empty());
    let mut later = execution.clone();
    assert_eq!(drive(&mut later, all_done, &mut 36_001_001), ["ended w", "completed"]);
    execution.cancel("enough".into()).unwrap();
    assert_eq!(drive(&mut execution, all_done, &mut 2_000), ["ended w", "undone"]);
}

#[test]
fn what_a_restored_store_says_was_running_waits_for_a_person() {
    let mut execution =
        of(vec![step("g", What::Parallel(vec![undone("g/a"), call("g/b")])), call("c")]);
    for name in ["g", "g/a", "g/b"] {
        execution.on(name, &Event::Begin, 1_000, &world()).unwrap();
    }
    execution.on("g/b", &Event::Ended(all_done("")), 1_000, &world()).unwrap();
    execution.lose("restored");
    assert_eq!((execution.stuck(), execution.is_paused), (vec!["g/a"], true));
    execution.pause(false).unwrap();
    assert!(execution.next(&world(), 2_000).is_empty());
    execution.cancel("enough".into()).unwrap();
    let done = drive(&mut execution, all_done, &mut 2_000);
    assert_eq!(done, ["undone g/a", "undone in part"], "of `g/b` nothing says how it is undone");
}

#[test]
fn another_mode_is_approved_anew() {
    let mut execution = of(vec![step("ok", What::Approval { by_other: false }), call("a")]);
    drive(&mut execution, all_done, &mut 1_000);
    execution.answer("ok", true, "bob", 1_000).unwrap();
    execution.switch(Mode::Ungraceful).unwrap();
    assert_eq!(drive(&mut execution, all_done, &mut 1_000), ["asked ok"]);
}

#[test]
fn a_step_that_hangs_is_left_to_itself_and_undone_first() {
    let mut execution = of(vec![undone("a"), undone("b")]);
    execution.on("a", &Event::Begin, 1_000, &world()).unwrap();
    execution.on("a", &Event::Ended(all_done("")), 5_000, &world()).unwrap();
    execution.on("b", &Event::Begin, 2_000, &world()).unwrap();
    execution.cancel("enough".into()).unwrap();
    assert!(execution.next(&world(), 2_000).is_empty());
    execution.resolve("b", &Event::Skip("it hangs".into()), 2_000).unwrap();
    // By the order of their ends, not by clocks.
    let done = drive(&mut execution, all_done, &mut 2_000);
    assert_eq!(done, ["undone b", "undone a", "undone"]);
}

#[test]
fn conditions_and_the_mode_are_looked_at_when_a_step_begins() {
    let condition = |state| Condition { app: APP.into(), cell: "b".into(), states: [state].into() };
    let only_if = |name: &str, state| Step { only_if: vec![condition(state)], ..call(name) };
    let mut execution = of(vec![
        only_if("a", CellState::Passive),
        only_if("b", CellState::Active),
        Step { mode: Some(Mode::Ungraceful), ..call("c") },
        Step { mode: Some(Mode::Ungraceful), ..call("d") },
    ]);
    for expected in ["begun a", "skipped b", "skipped c"] {
        let deeds = execution.next(&world(), 1_000);
        assert_eq!(shown(&deeds), [expected]);
        let Some(Deed::Step { step, event, action }) = deeds.first() else { panic!() };
        execution.on(step, event, 1_000, &world()).unwrap();
        if action.is_some() {
            execution.on(step, &Event::Ended(all_done("")), 1_000, &world()).unwrap();
        }
    }
    assert_eq!(execution.progress("b").text, "`b` of `shop` is passive, not active");
    execution.switch(Mode::Ungraceful).unwrap();
    assert!(execution.switch(Mode::Ungraceful).is_err());
    assert_eq!(shown(&execution.next(&world(), 1_000)), ["begun d"]);
}

#[test]
fn another_person_approves_in_time() {
    let mut execution = of(vec![step("ok", What::Approval { by_other: true }), call("a")]);
    let mut now = 1_000;
    assert_eq!(drive(&mut execution, all_done, &mut now), ["asked ok"]);
    assert!(matches!(execution.answer("ok", true, "alice", now), Err(PlanError::Own { .. })));
    assert!(matches!(execution.answer("a", true, "bob", now), Err(PlanError::NotNow { .. })));
    assert!(matches!(execution.answer("x", true, "bob", now), Err(PlanError::NoStep { .. })));
    let mut late = execution.clone();
    execution.answer("ok", true, "bob", now).unwrap();
    assert_eq!(drive(&mut execution, all_done, &mut now), ["begun a", "completed"]);
    assert_eq!(drive(&mut late, all_done, &mut 62_000), ["declined ok"]);
    assert_eq!(late.stuck(), ["ok"]);
    assert!(late.answer("ok", true, "bob", now).is_err(), "it is too late");
    let skip = Event::Skip("by alice".into());
    assert!(late.resolve("ok", &skip, now).is_err(), "nobody gets round it");
    late.resolve("ok", &Event::Retry, now).unwrap();
    assert_eq!(drive(&mut late, all_done, &mut 62_000), ["asked ok"]);
}

#[test]
fn what_is_paused_begins_nothing() {
    let mut execution = of(vec![call("a"), call("b")]);
    execution.pause(true).unwrap();
    assert!(execution.next(&world(), 1_000).is_empty() && execution.pause(true).is_err());
    execution.pause(false).unwrap();
    assert_eq!(shown(&execution.next(&world(), 1_000)), ["begun a"]);
    execution.cancel("enough".into()).unwrap();
    assert_eq!(shown(&execution.next(&world(), 1_000)), ["undone"], "nothing was done yet");
}

#[test]
fn between_two_tries_time_passes_whatever_the_clock_does() {
    let mut execution = of(vec![Step { tries: 2, pause_ms: 500, ..call("a") }]);
    execution.on("a", &Event::Begin, 10_000, &world()).unwrap();
    let failed = Event::Ended(Outcome::Failed("no".into()));
    execution.on("a", &failed, 10_000, &world()).unwrap();
    assert!(execution.next(&world(), 10_499).is_empty());
    assert_eq!(shown(&execution.next(&world(), 10_500)), ["begun a"]);
    assert_eq!(shown(&execution.next(&world(), 5_000)), ["begun a"]);
}

#[test]
fn a_dry_run_goes_by_the_same_decisions() {
    let is_passive =
        Condition { app: APP.into(), cell: "a".into(), states: [CellState::Passive].into() };
    let execution = of(vec![
        step("ok", What::Approval { by_other: false }),
        step("s", What::Do(activate("b"))),
        Step { only_if: vec![is_passive], ..call("then") },
        Step { mode: Some(Mode::Ungraceful), ..call("not") },
    ]);
    let lines: Vec<String> = execution
        .foresee(world())
        .into_iter()
        .map(|line| format!("{}: {}", line.step, line.text))
        .collect();
    assert_eq!(
        lines,
        [
            "ok: a person approves",
            "s: `b` of `shop` becomes active",
            "then: POST http://127.0.0.1/then",
            "not: skipped: it is for ungraceful ones"
        ]
    );
}

#[test]
fn every_event_has_an_answer_in_every_state() {
    let events = [
        Event::Begin,
        Event::Ask,
        Event::Ended(all_done("")),
        Event::Ended(Outcome::Unknown(String::new())),
        Event::Approve(String::new()),
        Event::Decline(String::new()),
        Event::Retry,
        Event::Skip(String::new()),
        Event::Undo,
    ];
    let mut table = String::new();
    for state in StepState::ALL {
        for event in &events {
            if let Some(after) = state.after(event, false) {
                let asked = asked(event);
                table.push_str(&format!("{state} {asked} {after}\n"));
            }
        }
    }
    // What has ended for good does not change.
    for end in ["undone ", "left "] {
        assert!(!table.lines().any(|line| line.starts_with(end)), "{table}");
    }
    assert_eq!(table.lines().count(), 19, "{table}");
}

/// Plans of any shape.
fn steps(depth: u32) -> BoxedStrategy<Vec<What>> {
    let leaf = prop_oneof![
        Just(What::Do(http("x"))),
        Just(What::Do(activate("b"))),
        Just(What::Do(Action::Wait { ms: 1 })),
        Just(What::Approval { by_other: false }),
    ];
    let inner = move || {
        steps(depth - 1)
            .prop_map(|whats| whats.into_iter().map(|what| step("", what)).collect::<Vec<Step>>())
    };
    let one = match depth {
        0 => leaf.boxed(),
        _ => prop_oneof![leaf, inner().prop_map(What::Sequence), inner().prop_map(What::Parallel),]
            .boxed(),
    };
    proptest::collection::vec(one, 0..4).boxed()
}

/// Gives each step a name of its own, and properties by chance.
fn named(steps: &mut [Step], prefix: &str, bits: &mut impl FnMut() -> u64) {
    for (at, step) in steps.iter_mut().enumerate() {
        step.name = format!("{prefix}{at}");
        step.tries = 1 + u32::try_from(bits() % 3).unwrap();
        step.idempotent = bits().is_multiple_of(2);
        step.undo = bits().is_multiple_of(2).then(|| Undo::Do(http("undo")));
        let inner = format!("{}/", step.name);
        if let What::Sequence(steps) | What::Parallel(steps) = &mut step.what {
            named(steps, &inner, bits);
        }
    }
}

proptest! {
    /// Whatever happens: nothing begins before what it follows is over, nothing that was done is done again, what may have
    /// been done is undone if that is possible, and with a person who answers it comes to an end.
    #[test]
    fn any_plan_keeps_its_order_and_ends(whats in steps(2), seed: u64, is_drill: bool, undoes: bool) {
        let mut random = seed | 1;
        let mut bits = move || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random
        };
        let mut all: Vec<Step> = whats.into_iter().map(|what| step("", what)).collect();
        named(&mut all, "", &mut bits);
        let mut execution = of(all);
        execution.is_drill = is_drill;
        if undoes {
            execution.plan.on_failure = OnFailure::Undo;
        }
        let (mut now, mut going) = (1_000, Vec::<String>::new());
        let mut done = Vec::<String>::new();
        let mut turns = 0;
        while execution.ending.is_none() {
            turns += 1;
            prop_assert!(turns < 5_000, "it does not end: {execution:?}");
            now += 1;
            for deed in execution.next(&world(), now) {
                match deed {
                    Deed::GoBack(why) => {
                        prop_assert!(going.is_empty() || undoes);
                        execution.cancel(why).unwrap();
                    }
                    Deed::End(ending) => {
                        prop_assert!(going.is_empty(), "{going:?} goes on");
                        execution.end(ending, now);
                    }
                    Deed::Step { step, event, action } => {
                        if matches!(event, Event::Begin | Event::Ask) {
                            prop_assert!(!execution.goes_back);
                            prop_assert!(!done.contains(&step), "{step} is done twice");
                        }
                        if event == Event::Undo {
                            prop_assert!(execution.goes_back && going.is_empty());
                        }
                        execution.on(&step, &event, now, &world()).unwrap();
                        if action.is_some() {
                            going.push(step);
                        }
                    }
                }
            }
            // Somebody cancels, a step ends somehow, or control crashes.
            if bits() % 60 == 0 {
                let _ = execution.cancel("enough".into());
            }
            if bits() % 20 == 0 {
                for name in std::mem::take(&mut going) {
                    let step = execution.plan.step(&name).unwrap().clone();
                    let Some(action) = execution.being_done(&step) else { continue };
                    match execution.found(&step, &action, now + 100_000) {
                        Found::Lost(outcome) => {
                            execution.on(&name, &Event::Ended(outcome), now, &world()).unwrap();
                        }
                        Found::Wait | Found::Again => going.push(name),
                    }
                }
            }
            if !going.is_empty() && bits() % 2 == 0 {
                let at = usize::try_from(bits()).unwrap_or(0) % going.len();
                let name = going.swap_remove(at);
                let outcome = match bits() % 7 {
                    6 => Outcome::Already("a".into()),
                    0 => Outcome::NotDone("n".into()),
                    1 => Outcome::Failed("f".into()),
                    2 => Outcome::Unknown("u".into()),
                    _ => Outcome::Done("d".into()),
                };
                if outcome.is_done() && execution.state(&name) == StepState::Running {
                    done.push(name.clone());
                }
                execution.on(&name, &Event::Ended(outcome), now, &world()).unwrap();
            }
            // A person answers.
            let stuck: Vec<String> = execution.stuck().into_iter().map(str::to_owned).collect();
            for name in stuck {
                let is_asked = execution.state(&name) == StepState::Asking;
                let said = match bits() % 3 {
                    0 if is_asked => execution.answer(&name, true, "bob", now),
                    1 => execution.resolve(&name, &Event::Skip("s".into()), now),
                    _ if is_asked => execution.answer(&name, true, "bob", now),
                    _ => execution.resolve(&name, &Event::Retry, now),
                };
                // An approval is not left out before it has failed.
                prop_assert!(said.is_ok() || is_asked, "{said:?}");
            }
        }
        if execution.ending == Some(PlanEnding::Undone) {
            prop_assert_eq!(execution.left(), Vec::<String>::new());
        }
        if execution.ending == Some(PlanEnding::Completed) {
            for step in execution.plan.all_steps() {
                let state = execution.state(&step.name);
                let parent_skipped = step.name.rmatch_indices('/').any(|(at, _)| {
                    execution.state(&step.name[..at]) == StepState::Skipped
                });
                prop_assert!(
                    parent_skipped || matches!(state, StepState::Done | StepState::Skipped),
                    "{} is {state}", step.name
                );
            }
        }
    }
}
