//! A few hundred worlds; `cargo xtask sim` runs as many as it is told.

use sim::{Planted, Summary, Weather, run};

fn clean(weather: Weather, seeds: std::ops::Range<u64>) -> Summary {
    let mut all = Summary::default();
    for seed in seeds {
        match run(seed, weather, None) {
            Ok(summary) => all = all.and(summary),
            Err(violation) => panic!("seed {seed}, {weather:?}: {violation}"),
        }
    }
    all
}

#[test]
fn worlds_in_which_everything_goes_wrong() {
    let all = clean(Weather::Any, 0..150);
    assert!(all.failovers > 150 && all.tenures > 150, "{all:?}");
}

#[test]
fn worlds_in_which_only_control_goes_wrong() {
    let all = clean(Weather::ControlOnly, 0..150);
    assert!(all.pledges > 150 && all.failovers < 5, "{all:?}");
}

#[test]
fn worlds_in_which_one_switchover_follows_the_other() {
    let all = clean(Weather::Planned, 0..150);
    assert!(all.switchovers > 100 && all.tenures > 150, "{all:?}");
}

/// Each invariant fires where it should, within so many worlds.
#[test]
fn planted_faults_are_found() {
    for (planted, weather, invariants) in [
        (Planted::LeaseNotWaitedFor, Weather::Any, "one_primary"),
        (Planted::PledgesNotEnded, Weather::Planned, "proxies_follow"),
        (Planted::SeatTakenEarly, Weather::Any, "one_control"),
        (Planted::SeatNotCompared, Weather::Any, "seat_writes"),
        (Planted::NobodyPleads, Weather::ControlOnly, "healthy_goes_on"),
        (Planted::GrantsForgotten, Weather::Any, "one_primary"),
        (Planted::EpochNotKept, Weather::Any, "epochs_grow"),
        (Planted::StepLost, Weather::Any, "recovers"),
        (Planted::ProofNotAsked, Weather::Any, "proxies_follow"),
        (Planted::LateSql, Weather::Planned, "one_primary"),
    ] {
        let found = (0..5_000).find_map(|seed| run(seed, weather, Some(planted)).err());
        let fired = found.as_ref().map(|violation| violation.invariant);
        assert_eq!(fired, Some(invariants), "{planted:?}: {found:?}");
    }
}
