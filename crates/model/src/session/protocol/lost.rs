//! What a client is answered whose server is gone, so that its session can go on with another.
//!
//! Whatever has not been answered has failed, as far as anybody can tell: each request that awaits a ReadyForQuery gets
//! an error before it, unless it was told one. Nothing is answered by a success.

use wire::backend::TxStatus;

use super::{Protocol, Request, Unnamed};

/// What is sent to the client in the server's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    /// That what it has asked for has failed.
    Error,
    Ready(TxStatus),
}

impl Protocol {
    /// It is known what the client waits for.
    pub fn may_lose_server(&self) -> bool {
        !self.out_of_step && self.doubtful == 0
    }

    /// The server is gone, and the transaction is in `status` from now on. Gives what the client is answered.
    pub fn on_server_lost(&mut self, status: TxStatus) -> Vec<Reply> {
        let mut requests = std::mem::take(&mut self.requests);
        if std::mem::take(&mut self.copy_in) && requests.front() == Some(&Request::Execute) {
            // The client knows that no Sync counts that it sent before the end of its data.
            let end = requests.iter().position(|request| *request == Request::CopyEnd);
            let in_copy = end.unwrap_or(requests.len());
            let mut at = 0;
            requests.retain(|request| {
                at += 1;
                at > in_copy || *request != Request::Sync
            });
            self.batch_open |= !requests.contains(&Request::Sync);
        }
        let mut replies = Vec::new();
        let (mut told, mut asked) = (self.error_told, false);
        for request in requests {
            self.named.skipped += usize::from(request.is_about_names());
            match request {
                Request::Query | Request::FunctionCall | Request::Sync => {
                    if !told {
                        replies.push(Reply::Error);
                    }
                    replies.push(Reply::Ready(status));
                    (told, asked) = (false, false);
                }
                Request::OwnQuery | Request::OwnParse | Request::OwnClose | Request::CopyEnd => (),
                _ => asked = true,
            }
            if matches!(request, Request::Query | Request::ParseUnnamed | Request::CloseUnnamed) {
                // It would have been dropped (`exec_simple_query`, `exec_parse_message`).
                self.unnamed = Unnamed::Absent;
            }
        }
        if asked || self.batch_open || self.skipping {
            if !told {
                replies.push(Reply::Error);
            }
            self.skipping = true;
        }
        self.error_told = self.skipping;
        (self.batch_open, self.query_unread) = (false, false);
        (self.savepoints, self.own_refused) = (false, false);
        self.status = status;
        replies
    }

    /// There is no server, and a request of the client is refused. Gives what it is answered.
    pub fn refuse_alone(&mut self, tag: u8) -> Vec<Reply> {
        match tag {
            b'S' => self.sync_alone(),
            b'Q' | b'F' => {
                // It would have been dropped.
                self.unnamed = Unnamed::Absent;
                vec![Reply::Error, Reply::Ready(self.status)]
            }
            _ => {
                (self.skipping, self.error_told) = (true, true);
                vec![Reply::Error]
            }
        }
    }

    /// What is skipped would have begun a block: what follows is run in none, so it is not run.
    pub fn fail_alone(&mut self) {
        self.status = TxStatus::Failed;
    }

    /// The unnamed statement was to be replaced, and was not.
    pub fn drop_unnamed(&mut self) {
        self.unnamed = Unnamed::Absent;
    }

    /// There is no server, and the client sends a Sync.
    pub fn sync_alone(&mut self) -> Vec<Reply> {
        (self.skipping, self.error_told) = (false, false);
        vec![Reply::Ready(self.status)]
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::play;
    use super::*;

    const ERROR: Reply = Reply::Error;
    const IDLE: Reply = Reply::Ready(TxStatus::Idle);
    const FAILED: Reply = Reply::Ready(TxStatus::Failed);

    #[track_caller]
    fn lost(transcript: &str, status: TxStatus, expected: &[Reply]) -> Protocol {
        let mut protocol = play(transcript);
        assert_eq!(protocol.on_server_lost(status), expected, "{transcript}");
        protocol
    }

    #[test]
    fn nothing_is_said_to_whoever_waits_for_nothing() {
        assert!(lost("", TxStatus::Idle, &[]).is_idle());
        assert!(lost(">Q <C <ZT", TxStatus::Failed, &[]).is_quiet());
    }

    #[test]
    fn each_request_fails_once() {
        lost(">Q", TxStatus::Idle, &[ERROR, IDLE]);
        lost(">Q <T <D", TxStatus::Idle, &[ERROR, IDLE]);
        lost(">Q <E", TxStatus::Idle, &[IDLE]);
        lost(">Q >Q", TxStatus::Failed, &[ERROR, FAILED, ERROR, FAILED]);
        lost(">P: >B >E >S", TxStatus::Idle, &[ERROR, IDLE]);
        lost(">P: >B >E >S <E", TxStatus::Idle, &[IDLE]);
        lost(">P: >E >S >E >S <1 <E", TxStatus::Idle, &[IDLE, ERROR, IDLE]);
    }

    #[test]
    fn what_only_a_sync_commits_is_no_success() {
        lost(">P: >B >E >S <1 <2 <C", TxStatus::Idle, &[ERROR, IDLE]);
    }

    #[test]
    fn a_batch_is_skipped_to_its_end() {
        for batch in [">P: >B", ">P: >B <1 <2", ">Q >P:"] {
            let expected: &[Reply] =
                if batch.starts_with(">Q") { &[ERROR, IDLE, ERROR] } else { &[ERROR] };
            let mut protocol = lost(batch, TxStatus::Idle, expected);
            assert!(protocol.is_skipping() && !protocol.is_quiet());
            assert_eq!(protocol.sync_alone(), [IDLE]);
            assert!(protocol.is_idle(), "{batch}");
        }
        let mut protocol = lost(">P: <E >B", TxStatus::Idle, &[]);
        assert_eq!(protocol.sync_alone(), [IDLE]);
    }

    #[test]
    fn a_copy_ends_as_its_client_expects() {
        lost(">Q <G", TxStatus::Idle, &[ERROR, IDLE]);
        lost(">Q <G >c", TxStatus::Idle, &[ERROR, IDLE]);
        // The Sync behind Execute was read as part of the COPY, and the one behind its end counts.
        let mut protocol = lost(">P: >B >E >S <1 <2 <G", TxStatus::Idle, &[ERROR]);
        assert_eq!(protocol.sync_alone(), [IDLE]);
        lost(">P: >B >E >S <1 <2 <G >c >S", TxStatus::Idle, &[ERROR, IDLE]);
    }

    #[test]
    fn what_is_unnamed_is_gone_if_it_was_to_be_replaced() {
        let kept = lost(">P: >S <1 <ZI >B >S", TxStatus::Idle, &[ERROR, IDLE]);
        assert_eq!(kept.unnamed(), Unnamed::Last);
        for replaced in [">P: >S <1 <ZI >P: >S", ">P: >S <1 <ZI >Q"] {
            let protocol = lost(replaced, TxStatus::Idle, &[ERROR, IDLE]);
            assert_eq!(protocol.unnamed(), Unnamed::Absent, "{replaced}");
        }
    }

    #[test]
    fn whoever_is_refused_without_a_server_goes_on_behind_its_sync() {
        let mut protocol = lost(">Q <C <ZT", TxStatus::Failed, &[]);
        assert_eq!(protocol.refuse_alone(b'Q'), [ERROR, FAILED]);
        assert_eq!(protocol.refuse_alone(b'P'), [ERROR]);
        assert!(protocol.is_skipping());
        assert_eq!(protocol.sync_alone(), [FAILED]);
        assert!(protocol.is_quiet());
    }

    proptest::proptest! {
        #[test]
        fn every_request_that_is_ready_once_is_answered_once(script: Vec<u8>) {
            let mut protocol = Protocol::new();
            let ends = |request: &Request| matches!(request, Request::Query | Request::FunctionCall | Request::Sync);
            for byte in script {
                let tag = b"QPBDESHF"[usize::from(byte % 8)];
                protocol.on_frontend(tag, Some(0), Some(0));
                if byte >= 192 {
                    protocol.on_backend(b'E', None);
                    if protocol.requests.front().is_some_and(ends) {
                        protocol.on_backend(b'Z', Some(TxStatus::Idle));
                    }
                }
            }
            let waits = protocol.requests.iter().filter(|request| ends(request)).count();
            let replies = protocol.on_server_lost(TxStatus::Idle);
            let ready = replies.iter().filter(|reply| **reply == IDLE).count();
            proptest::prop_assert_eq!(ready, waits);
            proptest::prop_assert!(!replies.windows(2).any(|pair| pair == [ERROR, ERROR]));
            if protocol.is_skipping() {
                protocol.sync_alone();
            }
            proptest::prop_assert!(protocol.is_idle());
        }
    }
}
