//! Replication slots on a server.

use std::collections::BTreeSet;

use model::slots::{Do, Slot, next};
use pg::admin::Admin;

/// Makes those that are wanted, and drops those `ours` that keep WAL for nobody. Gives those by which a standby may receive, and
/// what could not be done.
///
/// # Errors
/// Nothing is known of its slots.
pub(crate) async fn keep(
    server: &mut Admin,
    wanted: &BTreeSet<String>,
    ours: &BTreeSet<String>,
) -> Result<(BTreeSet<String>, Vec<String>), String> {
    let chain = |error| model::chain(&error);
    let sql = "SELECT slot_name, active::text, (wal_status IS NOT DISTINCT FROM 'lost')::text \
        FROM pg_replication_slots WHERE slot_type = 'physical' AND NOT temporary";
    let rows = server.rows(sql).await.map_err(chain)?;
    let slot = |row: Vec<Option<String>>| {
        let mut row = row.into_iter().map(Option::unwrap_or_default);
        let name = row.next()?;
        let mut is = || row.next().as_deref() == Some("true");
        Some(Slot { name, is_active: is(), is_lost: is() })
    };
    let seen: Vec<Slot> = rows.into_iter().filter_map(slot).collect();
    let usable = seen.iter().filter(|slot| wanted.contains(&slot.name) && !slot.is_lost);
    let mut there: BTreeSet<String> = usable.map(|slot| slot.name.clone()).collect();
    let mut failed = Vec::new();
    for step in next(&seen, wanted, ours) {
        // Names of slots are of letters, digits and `_` alone, else there would be none.
        let (name, sql) = match &step {
            Do::Create(name) => {
                (name, format!("SELECT pg_create_physical_replication_slot('{name}', true)"))
            }
            Do::Drop(name) => (name, format!("SELECT pg_drop_replication_slot('{name}')")),
        };
        match (server.rows(&sql).await.map_err(chain), &step) {
            (Ok(_), Do::Create(name)) => {
                tracing::info!(name, "slot created");
                there.insert(name.clone());
            }
            (Ok(_), Do::Drop(name)) => tracing::info!(name, "slot dropped"),
            (Err(error), _) => failed.push(format!("slot `{name}`: {error}")),
        }
    }
    Ok((there, failed))
}
