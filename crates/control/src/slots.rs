//! Replication slots on a server.

use std::collections::BTreeSet;

use model::slots::{Do, Slot, is_ours, next};
use pg::admin::Admin;

/// Makes those that are wanted, and drops those that keep WAL for nobody. Gives those by which a standby may receive.
pub(crate) async fn keep(
    server: &mut Admin,
    wanted: &BTreeSet<String>,
) -> Result<BTreeSet<String>, String> {
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
    let usable = seen.iter().filter(|slot| is_ours(&slot.name) && !slot.is_lost);
    let mut there: BTreeSet<String> = usable.map(|slot| slot.name.clone()).collect();
    for step in next(&seen, wanted) {
        // Names of slots are of letters, digits and `_` alone, else there would be none.
        match step {
            Do::Create(name) => {
                let sql = format!("SELECT pg_create_physical_replication_slot('{name}', true)");
                server.rows(&sql).await.map_err(chain)?;
                tracing::info!(name, "slot created");
                there.insert(name);
            }
            Do::Drop(name) => {
                let sql = format!("SELECT pg_drop_replication_slot('{name}')");
                server.rows(&sql).await.map_err(chain)?;
                tracing::info!(name, "slot dropped");
                there.remove(&name);
            }
        }
    }
    there.retain(|name| wanted.contains(name));
    Ok(there)
}
