//! The application and its executions in the store. Each change is one transaction that compares first.

use model::audit::{Asking, Draft};
use model::cell::Epoch;
use model::persisted::{
    Application, Attended, Execution, Pleads, Registered, application_key, attended_key,
    execution_key, execution_prefix, pleads_key, proxy_key,
};
use model::plan::run::{PlanExecution, plan_execution_key, plan_execution_prefix};
use model::switchover::Ending;
use store::{Revision, Store, StoreError, Txn};
use thiserror::Error;

use crate::audit::noting;

#[derive(Debug, Error)]
pub enum RecordError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("record `{key}` in the store cannot be read")]
    Unreadable { key: String, source: serde_json::Error },
    #[error("a restore of the store was broken off: `holdfast store restore` has to be run again")]
    Restoring,
    #[error("application `{0}` is not in the store")]
    Missing(String),
    #[error(transparent)]
    Cell(#[from] model::cell::CellError),
}

/// Is there while a copy is put into the store in several transactions.
pub const RESTORING_KEY: &str = "restoring";

/// The record of what Holdfast does by itself.
pub(crate) fn own(app: &str, did: &'static str, epoch: Epoch, reason: &str, text: String) -> Draft {
    let Asking { by, reason, .. } = Asking::own(reason);
    Draft { by, did, app: app.into(), epoch: epoch.0, reason, text }
}

/// An application as it was read, and when.
#[derive(Debug, Clone)]
pub struct Seen {
    pub application: Application,
    pub revision: Revision,
}

pub(crate) fn encode<T: serde::Serialize>(key: &str, value: &T) -> Result<Vec<u8>, RecordError> {
    serde_json::to_vec(value).map_err(|source| RecordError::Unreadable { key: key.into(), source })
}

pub(crate) fn decode<T: serde::de::DeserializeOwned>(
    key: &str,
    value: &[u8],
) -> Result<T, RecordError> {
    serde_json::from_slice(value)
        .map_err(|source| RecordError::Unreadable { key: key.into(), source })
}

/// # Errors
/// The store cannot be read, or holds a part of a copy only.
pub fn must_be_whole(store: &dyn Store) -> Result<(), RecordError> {
    match store.get(RESTORING_KEY)? {
        Some(_) => Err(RecordError::Restoring),
        None => Ok(()),
    }
}

/// # Errors
/// The store cannot be read, or not written.
pub fn open_application(
    store: &dyn Store,
    app: &str,
    first: impl FnOnce() -> Application,
) -> Result<Seen, RecordError> {
    let key = application_key(app);
    if store.get(&key)?.is_none() {
        let first = first();
        let txn = Txn::default().expect(&key, None).put(&key, encode(&key, &first)?);
        let text = format!("cell `{}` is active", first.active().unwrap_or_default());
        commit(store, txn, Some(own(app, "create", first.epoch, "it is configured", text)))?;
    }
    application(store, app)
}

/// # Errors
/// The store cannot be read, or does not know the application.
pub fn application(store: &dyn Store, app: &str) -> Result<Seen, RecordError> {
    let key = application_key(app);
    let found = store.get(&key)?.ok_or_else(|| RecordError::Missing(app.into()))?;
    Ok(Seen { application: decode(&key, &found.value)?, revision: found.revision })
}

/// Writes an application and an execution of it in one transaction, and what is to be recorded of that, if the application is
/// as it was seen.
///
/// # Errors
/// Somebody else has changed it, or the store cannot be written.
pub fn write(
    store: &dyn Store,
    app: &str,
    seen: Revision,
    application: &Application,
    execution: &Execution,
    draft: Option<Draft>,
) -> Result<Revision, RecordError> {
    let (app_key, key) = (application_key(app), execution_key(app, execution.id));
    let txn = Txn::default()
        .expect(&app_key, Some(seen))
        .put(&app_key, encode(&app_key, &changed(application))?)
        .put(&key, encode(&key, execution)?);
    commit(store, txn, draft)
}

fn changed(application: &Application) -> Application {
    Application { version: application.version.saturating_add(1), ..application.clone() }
}

fn commit(store: &dyn Store, txn: Txn, draft: Option<Draft>) -> Result<Revision, RecordError> {
    let txn = match draft {
        Some(draft) => noting(store, txn, draft)?,
        None => txn,
    };
    Ok(store.commit(&txn)?)
}

/// Writes an application that no execution is changing, if it is as it was seen.
///
/// # Errors
/// Somebody else has changed it, or the store cannot be written.
pub fn update(
    store: &dyn Store,
    app: &str,
    seen: Revision,
    application: &Application,
    draft: Draft,
) -> Result<Revision, RecordError> {
    let key = application_key(app);
    let changed = encode(&key, &changed(application))?;
    let txn = Txn::default().expect(&key, Some(seen)).put(&key, changed);
    commit(store, txn, Some(draft))
}

/// Whom the lease of a cell was given last, if it ever was.
///
/// # Errors
/// The store cannot be read.
pub fn attended(store: &dyn Store, app: &str, cell: &str) -> Result<Option<Attended>, RecordError> {
    let key = attended_key(app, cell);
    store.get(&key)?.map(|found| decode(&key, &found.value)).transpose()
}

/// Writes a record that nobody else writes.
///
/// # Errors
/// The store cannot be written.
pub fn put<T: serde::Serialize>(
    store: &dyn Store,
    key: &str,
    value: &T,
) -> Result<(), RecordError> {
    store.commit(&Txn::default().put(key, encode(key, value)?))?;
    Ok(())
}

/// Deletes a record that nobody else writes.
///
/// # Errors
/// The store cannot be written.
pub fn delete(store: &dyn Store, key: &str) -> Result<(), RecordError> {
    store.commit(&Txn::default().delete(key))?;
    Ok(())
}

/// Whom the agent of a cell may ask for pledges.
///
/// # Errors
/// The store cannot be read.
pub fn pleads(store: &dyn Store, app: &str, cell: &str) -> Result<Pleads, RecordError> {
    let key = pleads_key(app, cell);
    let found = store.get(&key)?.map(|found| decode(&key, &found.value)).transpose()?;
    Ok(found.unwrap_or_default())
}

/// Proxies of other processes that are remembered.
///
/// # Errors
/// The store cannot be read.
pub fn proxies(store: &dyn Store) -> Result<Vec<(String, Registered)>, RecordError> {
    let prefix = proxy_key("");
    let name = |key: &str| key.strip_prefix(&prefix).unwrap_or_default().to_owned();
    let all = store.list(&prefix)?;
    all.iter().map(|(key, found)| Ok((name(key), decode(key, &found.value)?))).collect()
}

/// Executions of plans of an application, oldest first, but for those that cannot be read.
///
/// # Errors
/// The store cannot be read.
pub fn plan_executions(store: &dyn Store, app: &str) -> Result<Vec<PlanExecution>, RecordError> {
    let mut all = Vec::new();
    for (key, found) in store.list(&plan_execution_prefix(app))? {
        match decode(&key, &found.value) {
            Ok(execution) => all.push(execution),
            Err(error) => tracing::warn!(key, error = model::chain(&error), "left out"),
        }
    }
    Ok(all)
}

/// Longest record of an execution of a plan, when it begins. Texts are added later.
const PLAN_LEN_MAX: usize = 512 * 1024;

/// # Errors
/// It could not be read again, or what is added later might not find room.
pub fn check_plan(execution: &PlanExecution) -> Result<(), String> {
    let key = plan_execution_key(&execution.app, execution.id);
    let bytes = encode(&key, execution).map_err(|error| model::chain(&error))?;
    if bytes.len() > PLAN_LEN_MAX {
        return Err(format!("its record has {} bytes, at most {PLAN_LEN_MAX} may be", bytes.len()));
    }
    decode::<PlanExecution>(&key, &bytes).map(drop).map_err(|error| model::chain(&error))
}

/// # Errors
/// The store cannot be read.
pub fn plan_execution(
    store: &dyn Store,
    app: &str,
    id: u64,
) -> Result<Option<(PlanExecution, Revision)>, RecordError> {
    let key = plan_execution_key(app, id);
    let found = store.get(&key)?;
    found.map(|found| Ok((decode(&key, &found.value)?, found.revision))).transpose()
}

/// The number of the next execution, of cells or of a plan. Whoever asks writes it before anybody else does.
///
/// # Errors
/// The store cannot be read.
pub fn next_id(store: &dyn Store, app: &str) -> Result<u64, RecordError> {
    // By their keys: one that cannot be read is in nobody's way.
    let last = |prefix: String| -> Result<u64, RecordError> {
        let all = store.list(&prefix)?;
        let number = |(key, _): &(String, _)| key.strip_prefix(&prefix)?.parse::<u64>().ok();
        Ok(all.iter().filter_map(number).max().unwrap_or(0))
    };
    let plans = last(plan_execution_prefix(app))?;
    Ok(last(execution_prefix(app))?.max(plans) + 1)
}

/// Writes an execution of a plan, if it is as it was seen, and the application if that changes.
///
/// # Errors
/// Somebody else has changed it, or the store cannot be written.
pub fn write_plan(
    store: &dyn Store,
    app: &str,
    application: Option<(Revision, &Application)>,
    (seen, execution): (Option<Revision>, &PlanExecution),
    draft: Option<Draft>,
) -> Result<Revision, RecordError> {
    let key = plan_execution_key(app, execution.id);
    let mut txn = Txn::default().expect(&key, seen).put(&key, encode(&key, execution)?);
    if let Some((seen, application)) = application {
        let key = application_key(app);
        let changed = encode(&key, &changed(application))?;
        txn = txn.expect(&key, Some(seen)).put(&key, changed);
    }
    commit(store, txn, draft)
}

/// Executions of an application, oldest first.
///
/// # Errors
/// The store cannot be read.
pub fn executions(store: &dyn Store, app: &str) -> Result<Vec<Execution>, RecordError> {
    let all = store.list(&execution_prefix(app))?;
    all.iter().map(|(key, found)| decode(key, &found.value)).collect()
}

/// # Errors
/// The store cannot be read.
pub fn execution(store: &dyn Store, app: &str, id: u64) -> Result<Option<Execution>, RecordError> {
    let key = execution_key(app, id);
    store.get(&key)?.map(|found| decode(&key, &found.value)).transpose()
}

/// Makes of a restored store one in which nobody holds a grant. Gives the applications and their epochs.
///
/// # Errors
/// The store cannot be read or written.
pub fn after_restore(store: &dyn Store) -> Result<Vec<(String, Epoch)>, RecordError> {
    let mut restored = Vec::new();
    for (key, found) in store.list(&application_key(""))? {
        let application = decode::<Application>(&key, &found.value)?.restored();
        let app = key.strip_prefix(&application_key("")).unwrap_or_default().to_owned();
        let mut txn = Txn::default()
            .expect(&key, Some(found.revision))
            .put(&key, encode(&key, &application)?);
        for mut execution in executions(store, &app)? {
            if matches!(execution.ending, None | Some(Ending::Stuck)) {
                execution.ending = Some(Ending::Aborted);
                execution.reason = Some("the store was restored from a copy".into());
                let key = execution_key(&app, execution.id);
                txn = txn.put(&key, encode(&key, &execution)?);
            }
        }
        if let Some(id) = application.plan
            && let Ok(Some((mut plan, _))) = plan_execution(store, &app, id)
        {
            // What has become of its steps since the copy, a person looks at first.
            plan.lose("the store was restored from a copy: look what became of it since");
            let key = plan_execution_key(&app, id);
            txn = txn.put(&key, encode(&key, &plan)?);
        }
        let text = "nobody holds the grant".to_owned();
        let reason = "the store was restored from a copy";
        commit(store, txn, Some(own(&app, "restore", application.epoch, reason, text)))?;
        restored.push((app, application.epoch));
    }
    Ok(restored)
}

#[cfg(test)]
mod tests {
    use store::memory::MemoryStore;

    use super::*;

    #[test]
    fn a_record_that_cannot_be_read_is_in_nobodys_way() {
        let store = MemoryStore::default();
        let key = plan_execution_key("shop", 7);
        store.commit(&Txn::default().put(&key, b"of another version".to_vec())).unwrap();
        assert_eq!(next_id(&store, "shop").unwrap(), 8);
        assert!(plan_executions(&store, "shop").unwrap().is_empty());
        assert!(plan_execution(&store, "shop", 7).is_err());
    }
}
