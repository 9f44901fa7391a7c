//! The whole product on real servers: real processes, real clients, killed on purpose.

#![allow(clippy::unwrap_used)]

mod support;

mod agents;
mod audit;
mod batches;
mod battery;
mod between;
mod cells;
mod configuration;
mod crash;
mod drivers;
mod failover;
mod faults;
mod flood;
mod hostile;
mod kinds;
mod login;
mod lost;
mod moves;
mod nodes;
mod outlive;
mod pins;
mod plans;
mod policy;
mod pools;
mod proxies;
mod relay;
mod safety;
mod single;
mod targets;
mod three;
mod twins;
