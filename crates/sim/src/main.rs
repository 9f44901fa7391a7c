//! `sim SEEDS [FIRST]`: that many worlds of each weather; prints what was found, by its seed.

use std::process::ExitCode;

use sim::{Summary, Weather, run};

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1).map(|text| text.parse::<u64>());
    let (Some(Ok(count)), Ok(first)) = (args.next(), args.next().unwrap_or(Ok(0))) else {
        eprintln!("sim: how many worlds? Such as `sim 10000`, or `sim 1 4711` for one of them");
        return ExitCode::from(2);
    };
    let mut found = 0;
    for weather in [Weather::Any, Weather::ControlOnly, Weather::Planned] {
        let mut all = Summary::default();
        for seed in first..first.saturating_add(count) {
            match run(seed, weather, None) {
                Ok(summary) => all = all.and(summary),
                Err(violation) => {
                    println!("seed {seed}, {weather:?}: {violation}");
                    found += 1;
                }
            }
        }
        println!("{count} worlds of {weather:?}: {all:?}");
    }
    println!("{found} violations");
    if found == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
