//! Records of the store from arbitrary bytes: read or refused, the same again after being written, and no stage
//! makes two cells hold the grant. Keys of one application are never those of another.

#![no_main]

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use model::cell::{CellState, Epoch};
use model::persisted::{
    Application, Execution, LOG_LEN_MAX, LogEntry, LogEvent, application_key, execution_key,
    execution_prefix,
};
use model::switchover::{Outcome, Stage, next, resume};

#[derive(Debug, Arbitrary)]
struct Input<'a> {
    application: Option<&'a [u8]>,
    cells: [u8; 3],
    epoch: u64,
    execution: &'a [u8],
    stages: Vec<u8>,
    apps: [&'a str; 2],
    ids: [u64; 2],
}

const CELLS: [&str; 3] = ["a", "b", "c"];

fn holds_grant(state: &CellState) -> bool {
    state.takes_writes() || *state == CellState::Promoting
}

fn check_execution(bytes: &[u8]) {
    let Ok(execution) = serde_json::from_slice::<Execution>(bytes) else { return };
    let written = serde_json::to_vec(&execution).expect("what was read can be written");
    let mut again: Execution =
        serde_json::from_slice(&written).expect("what was written can be read");
    // The last bit of a float may be lost by JSON; a duration is for people only.
    for (entry, before) in again.log.iter_mut().zip(&execution.log) {
        assert_eq!(entry.took_ms.is_some(), before.took_ms.is_some());
        entry.took_ms = before.took_ms;
    }
    assert_eq!(again, execution);
    let len = again.log.len();
    again.record(LogEntry {
        at_ms: 0,
        stage: again.stage,
        event: LogEvent::Started,
        text: String::new(),
        took_ms: None,
    });
    assert!(again.log.len() == len + 1 || len >= LOG_LEN_MAX);
    for granted in [false, true] {
        // Wherever it stood, it goes on to an end.
        let mut stage = resume(execution.stage, granted);
        let mut count = 0;
        while let model::switchover::Next::Go(after) = next(stage, Outcome::Done) {
            stage = after;
            count += 1;
            assert!(count < Stage::ALL.len());
        }
    }
}

fn check_stages(mut app: Application, stages: &[u8]) {
    let names: Vec<String> = app.cells.keys().cloned().chain(["a".into(), "b".into()]).collect();
    for choice in stages {
        let stage = Stage::ALL[usize::from(*choice) % Stage::ALL.len()];
        let (from, to) = (&names[0], &names[1]);
        let before = app.clone();
        let result =
            if *choice < 128 { app.enter(stage, from, to) } else { app.leave(stage, from, to) };
        assert!(app.epoch >= before.epoch);
        let count = |app: &Application| app.cells.values().filter(|s| holds_grant(s)).count();
        assert!(count(&app) <= count(&before).max(1), "two cells hold the grant: {app:?}");
        let held = |app: &Application, name: &String| app.cells.get(name).is_some_and(holds_grant);
        for name in app.cells.keys() {
            let granted = held(&app, name) && !held(&before, name);
            assert!(!granted || app.epoch > before.epoch, "a grant without an epoch: {app:?}");
        }
        assert!(result.is_ok() || app.epoch == before.epoch);
    }
}

fuzz_target!(|input: Input<'_>| {
    check_execution(input.execution);
    let app = match input.application {
        None => {
            let state = |n: u8| CellState::ALL[usize::from(n) % CellState::ALL.len()];
            let cells = CELLS.iter().zip(input.cells).map(|(cell, n)| ((*cell).into(), state(n)));
            Application { epoch: Epoch(input.epoch), cells: cells.collect(), execution: None }
        }
        Some(bytes) => {
            let Ok(app) = serde_json::from_slice::<Application>(bytes) else { return };
            app
        }
    };
    let written = serde_json::to_vec(&app).expect("what was read can be written");
    assert_eq!(serde_json::from_slice::<Application>(&written).ok().as_ref(), Some(&app));
    // 2^64 grants are never given, so there is no next epoch of the last.
    let last = app.epoch.0 > u64::MAX - 1_000_000;
    // The store's records are Holdfast's own; it is no guard against one who writes two grants into them.
    let two = app.cells.values().filter(|state| holds_grant(state)).count() > 1;
    if !last && !two {
        check_stages(app, &input.stages);
    }

    let ([one, other], [id, next]) = (input.apps, input.ids);
    assert_eq!(application_key(one) == application_key(other), one == other);
    assert_eq!(execution_key(one, id) < execution_key(one, next), id < next);
    assert!(execution_key(one, id).starts_with(&execution_prefix(one)));
    let foreign = execution_key(one, id).starts_with(&execution_prefix(other));
    assert!(!foreign || one == other, "executions of {one:?} are listed under {other:?}");
});
