//! What would become of what is running if its server were lost now.
//!
//! A transaction that nobody has asked to commit is rolled back with its server, and its client may begin it again.
//! Of anything else it is not known whether it was committed.

use wire::backend::TxStatus;

use crate::sql::{Kind, Token};

/// What a text does to the block of its transaction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Block {
    /// Nothing: outside of a block it is a transaction by itself.
    #[default]
    Stays,
    /// BEGIN, and nothing else.
    Begins,
    /// ROLLBACK, and nothing else.
    RollsBack,
    /// COMMIT, and nothing else.
    Commits,
    /// It may commit, and begin another, or is not known.
    MayCommit,
}

impl Block {
    /// Of a statement that begins with `verb`, before `rest`.
    pub fn read<'a>(verb: &[u8], mut rest: impl Iterator<Item = Token<'a>>) -> Block {
        match verb {
            b"begin" | b"start" => Block::Begins,
            b"rollback" | b"abort" => {
                let mut next = rest.next();
                if next.is_some_and(|token| token.is_word("work") || token.is_word("transaction")) {
                    next = rest.next();
                }
                match next {
                    None => Block::RollsBack,
                    Some(token) if token.kind == Kind::Semicolon => Block::RollsBack,
                    Some(token) if token.is_word("to") => Block::Stays,
                    Some(_) => Block::MayCommit,
                }
            }
            b"commit" | b"end" => {
                let mut next = rest.next();
                if next.is_some_and(|token| token.is_word("work") || token.is_word("transaction")) {
                    next = rest.next();
                }
                match next {
                    None => Block::Commits,
                    Some(token) if token.kind == Kind::Semicolon => Block::Commits,
                    Some(_) => Block::MayCommit,
                }
            }
            b"prepare" => Block::MayCommit,
            _ => Block::Stays,
        }
    }

    /// Of a text with another statement behind it.
    pub fn and(self, next: Block) -> Block {
        match (self, next) {
            (Block::Stays, Block::Stays) => Block::Stays,
            _ => Block::MayCommit,
        }
    }
}

/// A block, as far as it is known before everything is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Open {
    No,
    Yes,
    /// If its BEGIN fails, what follows in its batch is skipped.
    InBatch,
    /// Its BEGIN may have failed, and what follows may be run without it.
    Perhaps,
}

/// What is running, and what has been sent behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flight {
    open: Open,
    may_be_committed: bool,
}

/// What has become of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lost {
    /// Nothing of it has happened.
    RolledBack,
    /// It may have been committed.
    InDoubt,
}

impl Flight {
    /// Everything is answered.
    pub fn at_rest(status: TxStatus) -> Flight {
        let open = if status == TxStatus::Idle { Open::No } else { Open::Yes };
        Flight { open, may_be_committed: false }
    }

    /// A text is sent to be run.
    pub fn runs(&mut self, block: Block) {
        match block {
            Block::Commits => *self = Flight { open: Open::No, may_be_committed: true },
            Block::MayCommit => *self = Flight { open: Open::Perhaps, may_be_committed: true },
            Block::Begins => {
                if self.open == Open::No {
                    self.open = Open::InBatch;
                }
            }
            Block::RollsBack => self.open = Open::No,
            Block::Stays => {
                self.may_be_committed |= matches!(self.open, Open::No | Open::Perhaps);
            }
        }
    }

    /// A portal is made of a text, and perhaps run. What begins a block does so only when it is run.
    pub fn binds(&mut self, block: Block) {
        match block {
            Block::Begins => (),
            Block::RollsBack => self.open = Open::Perhaps,
            Block::Commits => self.runs(Block::MayCommit),
            Block::Stays | Block::MayCommit => self.runs(block),
        }
    }

    /// A simple query, or the Sync of a batch, is sent: what follows is run whether it has failed or not.
    pub fn ends_batch(&mut self) {
        if self.open == Open::InBatch {
            self.open = Open::Perhaps;
        }
    }

    /// Its server is lost. Gives what has become of it, and what its transaction is from then on: one that is open, or may
    /// be, has failed, so that nothing that follows is run without what came before.
    pub fn lost(self) -> (Lost, TxStatus) {
        let lost = if self.may_be_committed { Lost::InDoubt } else { Lost::RolledBack };
        let status = if self.open == Open::No { TxStatus::Idle } else { TxStatus::Failed };
        (lost, status)
    }
}

impl Default for Flight {
    fn default() -> Flight {
        Flight::at_rest(TxStatus::Idle)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Block::{Begins, Commits, MayCommit, RollsBack, Stays};

    /// `None` ends a batch.
    fn after(status: TxStatus, sent: &[Option<Block>]) -> (Lost, TxStatus) {
        let mut flight = Flight::at_rest(status);
        for block in sent {
            match block {
                Some(block) => flight.runs(*block),
                None => flight.ends_batch(),
            }
        }
        flight.lost()
    }

    #[test]
    fn what_nobody_has_asked_to_commit_is_rolled_back() {
        let failed = (Lost::RolledBack, TxStatus::Failed);
        assert_eq!(after(TxStatus::Idle, &[]), (Lost::RolledBack, TxStatus::Idle));
        assert_eq!(after(TxStatus::InTransaction, &[]), failed);
        assert_eq!(after(TxStatus::InTransaction, &[Some(Stays), None, Some(Stays)]), failed);
        assert_eq!(after(TxStatus::Idle, &[Some(Begins), Some(Stays)]), failed);
        assert_eq!(after(TxStatus::Idle, &[Some(Begins), None]), failed);
        let rolled_back = after(TxStatus::InTransaction, &[Some(Stays), None, Some(RollsBack)]);
        assert_eq!(rolled_back, (Lost::RolledBack, TxStatus::Idle));
    }

    #[test]
    fn what_is_only_bound_begins_nothing() {
        let mut flight = Flight::default();
        flight.binds(Begins);
        flight.binds(Stays);
        assert_eq!(flight.lost(), (Lost::InDoubt, TxStatus::Idle));
        let mut flight = Flight::at_rest(TxStatus::InTransaction);
        flight.binds(RollsBack);
        assert_eq!(flight.lost(), (Lost::RolledBack, TxStatus::Failed));
    }

    #[test]
    fn what_may_be_committed_is_in_doubt() {
        let idle = (Lost::InDoubt, TxStatus::Idle);
        assert_eq!(after(TxStatus::Idle, &[Some(Stays)]), idle);
        assert_eq!(after(TxStatus::InTransaction, &[Some(Commits)]), idle);
        // It may have begun another.
        let failed = (Lost::InDoubt, TxStatus::Failed);
        assert_eq!(after(TxStatus::InTransaction, &[Some(MayCommit)]), failed);
        assert_eq!(after(TxStatus::Failed, &[Some(RollsBack), None, Some(Stays)]), idle);
        assert_eq!(
            after(TxStatus::Idle, &[Some(Begins), Some(Stays), Some(Commits)]),
            (Lost::InDoubt, TxStatus::Idle)
        );
        // The BEGIN may have failed by itself.
        assert_eq!(
            after(TxStatus::Idle, &[Some(Begins), None, Some(Stays)]),
            (Lost::InDoubt, TxStatus::Failed)
        );
        let again = after(TxStatus::InTransaction, &[Some(Commits), None, Some(Begins)]);
        assert_eq!(again, (Lost::InDoubt, TxStatus::Failed));
    }
}
