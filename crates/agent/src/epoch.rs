//! The highest epoch that was seen, on disk: an agent that comes back obeys nobody of an earlier one.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use model::cell::Epoch;

use crate::beside::{AgentError, write_durably};

pub(crate) struct EpochFile {
    path: PathBuf,
    /// What is on disk.
    written: Mutex<Epoch>,
}

impl EpochFile {
    /// # Errors
    /// It cannot be read, or holds no epoch.
    pub(crate) fn read(dir: &Path) -> Result<(EpochFile, Epoch), AgentError> {
        let path = dir.join("epoch");
        let epoch = match std::fs::read_to_string(&path) {
            Ok(text) => text.trim().parse().map(Epoch).map_err(|_| AgentError::Epoch {
                path: path.clone(),
                found: text.chars().take(40).collect(),
            })?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Epoch(0),
            Err(source) => {
                return Err(AgentError::File { path: path.clone(), what: "read", source });
            }
        };
        Ok((EpochFile { path, written: Mutex::new(epoch) }, epoch))
    }

    /// Remembers an epoch; a lower one than is there changes nothing. A lease and an order may bring one each at once.
    ///
    /// # Errors
    /// It cannot be written.
    pub(crate) fn see(&self, epoch: Epoch) -> Result<(), String> {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        if epoch > *written {
            write_durably(&self.path, format!("{epoch}\n").as_bytes())
                .map_err(|error| format!("`{}`: {error}", self.path.display()))?;
            *written = epoch;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both wrote to one temporary file: the second found none to rename, or the lower epoch was the last.
    #[test]
    fn the_highest_of_epochs_that_come_at_once_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (file, none) = EpochFile::read(dir.path()).unwrap();
        assert_eq!(none, Epoch(0));
        std::thread::scope(|scope| {
            for first in 1..=4 {
                let file = &file;
                scope.spawn(move || {
                    for epoch in (first..200).step_by(4) {
                        file.see(Epoch(epoch)).unwrap();
                    }
                });
            }
        });
        assert_eq!(EpochFile::read(dir.path()).unwrap().1, Epoch(199));
    }
}
