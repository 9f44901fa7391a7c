//! What proxies, of which there are several, and control say to each other, and what a proxy makes of it.
//!
//! A proxy goes by what control has told it for as long as the lease that came with that. If control is not heard, the
//! server itself may say that nothing has changed: it is still the primary that it was, and takes writes. Whoever changes
//! something fences the server first, so whoever waits for the length of a lease from then on knows that no proxy goes by
//! what was. A proxy that can prove neither serves nobody.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::barrier::{Order as Barrier, Report};
use crate::cell::{CellState, Epoch};
use crate::lease::{Moment, Terms};

/// Proxies that an installation may have.
pub const PROXIES_MAX: usize = 1_000;
/// Longest name of a proxy.
pub const NAME_LEN_MAX: usize = 64;
/// Ids of a proxy's sessions are its number in so many, so that they are nobody else's.
pub const SESSIONS_OF_ONE: u64 = 1_000_000_000_000;

/// A name that is no path and nobody else's certificate.
pub fn is_name(name: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !name.is_empty() && name.len() <= NAME_LEN_MAX && name.chars().all(is_plain)
}

/// The proxy that a session is of; 0 is the one in control's own process.
pub fn number_of(session: u64) -> u64 {
    session / SESSIONS_OF_ONE
}

/// Whom a message is from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sender {
    pub name: String,
    /// On which host, and in which network of it: there are no two of a name in one.
    pub host: u64,
    /// Another number each time the proxy is started.
    pub run: u64,
}

/// Asks what is to be served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renew {
    pub sender: Sender,
    /// Sessions of each application.
    pub sessions: BTreeMap<String, u64>,
    /// Applications whose sessions it holds by order: a control that has just been started does not know.
    pub holds: BTreeSet<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renewed {
    /// Ids of its sessions begin with this.
    pub number: u64,
    pub terms: Terms,
    /// Applications that are not named are unknown.
    pub routes: BTreeMap<String, Route>,
}

/// Where the sessions of an application are attached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Route {
    Open(Open),
    /// A change is under way; orders say what to do.
    Held,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Open {
    pub cell: String,
    pub state: CellState,
    pub epoch: Epoch,
}

/// Asks for orders, and waits a while for one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fetch {
    pub sender: Sender,
    /// The last order that has arrived, or 0; later ones are given again.
    pub last: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fetched {
    pub orders: Vec<Order>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    pub id: u64,
    /// What has not begun so long after it was asked for is not done any more: nobody waits for it.
    pub wait_max: Duration,
    pub what: Barrier,
}

/// What became of an order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Finished {
    pub sender: Sender,
    pub id: u64,
    pub report: Report,
}

/// Cancel requests that wait to be fetched; more at once are nobody's.
pub const CANCELS_MAX: usize = 64;
/// Later, a session may run something else than whoever wanted it cancelled has seen.
pub const CANCEL_MAX: Duration = Duration::from_secs(2);

/// A cancel request, by the key of a session, whosever that is.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cancel {
    pub pid: i32,
    pub secret: Vec<u8>,
}

/// The secret is nobody's business.
impl std::fmt::Debug for Cancel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cancel").field("pid", &self.pid).finish_non_exhaustive()
    }
}

/// A cancel request for none of the proxy's own sessions: some other's may be meant, as a load balancer sends each connection
/// anywhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stray {
    pub sender: Sender,
    pub cancel: Cancel,
}

/// Asks for those of others, and waits a while for one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FetchCancels {
    pub sender: Sender,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FetchedCancels {
    pub cancels: Vec<Cancel>,
}

/// The proxy ends, and its sessions have ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bye {
    pub sender: Sender,
}

/// What the server that sessions are attached to has answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    pub is_in_recovery: bool,
    pub timeline: u32,
    /// New transactions are read-only: somebody has fenced it.
    pub is_read_only: bool,
}

/// What a proxy knows of its way to control.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Contact {
    last: Option<Answered>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Answered {
    /// When that was asked which was answered last, and the first in a row without a gap.
    sent: Moment,
    unbroken_since: Moment,
    terms: Terms,
}

/// How long sessions are held for a control that is not heard: longer than it takes to start another.
const HELD_MAX: Duration = Duration::from_secs(60);

impl Contact {
    /// Control has answered what was asked at `sent`.
    pub fn answered(&mut self, sent: Moment, terms: Terms, now: Moment) {
        let before = self.last.filter(|last| now < last.terms.stop_at(last.sent));
        let unbroken_since = before.map_or(sent, |last| last.unbroken_since);
        let sent = before.map_or(sent, |last| last.sent.max(sent));
        self.last = Some(Answered { sent, unbroken_since, terms });
    }

    /// When that was asked which was answered last, if control still counts on this proxy.
    pub fn held(&self, now: Moment) -> Option<Moment> {
        self.last.filter(|last| now < last.terms.stop_at(last.sent)).map(|last| last.sent)
    }

    pub fn terms(&self) -> Option<Terms> {
        self.last.map(|last| last.terms)
    }

    /// Whether an order may be obeyed that was asked for at `sent`.
    ///
    /// # Errors
    /// Control has given it up, or may have.
    pub fn check(&self, order: &Order, sent: Moment, now: Moment) -> Result<(), String> {
        let Some(last) = self.last.filter(|_| self.held(now).is_some()) else {
            return Err("control is not heard any more".into());
        };
        if sent < last.unbroken_since {
            return Err("control was not heard since it was given".into());
        }
        if now >= sent.plus(order.wait_max) {
            return Err(format!("it was given longer than {:?} ago", order.wait_max));
        }
        Ok(())
    }

    /// Whoever is held is told: nobody comes back for them.
    fn is_lost(&self, now: Moment) -> bool {
        self.last.is_none_or(|last| now >= last.sent.plus(HELD_MAX))
    }
}

/// How a proxy stands in one application.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Standing {
    /// Nobody is served: nothing was told yet, or there is no proof any more that it still holds.
    Shut,
    Open {
        open: Open,
        /// When the last proof was asked for.
        proven: Moment,
        /// The server's timeline, once it has been asked.
        timeline: Option<u32>,
    },
    /// Sessions are held by an order, until another lets them go.
    Ordered,
}

/// What a proxy has to do by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Take every session from its server; new work waits.
    Cut,
    /// Serve.
    Release(Open),
    /// Tell and end whoever is held.
    GiveUp,
}

/// A proxy in one application.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Follower {
    standing: Standing,
    /// Of answers to what was asked before, nothing is known of what was done since.
    since: Moment,
    /// The highest epoch that was told.
    seen: Epoch,
    /// What is to be served, as soon as that is done.
    wanted: Option<Open>,
}

impl Default for Follower {
    fn default() -> Follower {
        let since = Moment(Duration::ZERO);
        Follower { standing: Standing::Shut, since, seen: Epoch(0), wanted: None }
    }
}

impl Follower {
    /// What is served.
    pub fn open(&self) -> Option<&Open> {
        match &self.standing {
            Standing::Open { open, .. } => Some(open),
            Standing::Shut | Standing::Ordered => None,
        }
    }

    /// Sessions are held by order.
    pub fn holds(&self) -> bool {
        self.standing == Standing::Ordered
    }

    /// Control has answered `route` to what was asked at `sent`.
    ///
    /// That a change is under way is no proof, and no reason to do anything: orders come by another way.
    pub fn told(&mut self, route: &Route, sent: Moment) -> Option<Action> {
        let Route::Open(told) = route else { return None };
        // An answer that was overtaken, or a store that is older than what was seen.
        if told.epoch < self.seen || sent < self.since {
            return None;
        }
        self.seen = told.epoch;
        match &mut self.standing {
            Standing::Open { open, proven, .. } if open == told => {
                *proven = (*proven).max(sent);
                None
            }
            // A change that was missed: sessions stand where they should not, or may do what they should not. They are
            // served again by the next answer.
            Standing::Open { .. } => {
                self.standing = Standing::Shut;
                Some(Action::Cut)
            }
            // Nothing is changed any more, and the order that lets them go was lost.
            Standing::Shut | Standing::Ordered => {
                self.wanted = Some(told.clone());
                Some(Action::Release(told.clone()))
            }
        }
    }

    /// Until when anything of a client may reach a server, unless something is proven anew. None where nobody is to be on
    /// one.
    ///
    /// Sessions that are held end their transactions by what control has said last: whoever gives the order counts on that.
    pub fn passes_until(&self, contact: &Contact) -> Option<Moment> {
        let proven = match &self.standing {
            Standing::Open { proven, .. } => Some(*proven),
            Standing::Ordered => contact.last.map(|last| last.sent),
            Standing::Shut => None,
        };
        proven.zip(contact.terms()).map(|(proven, terms)| terms.stop_at(proven))
    }

    /// What was to be done is still to be done: no order has come between.
    pub fn wants(&self, action: &Action) -> bool {
        match action {
            Action::Release(open) => self.wanted.as_ref() == Some(open),
            Action::GiveUp => self.standing == Standing::Ordered,
            Action::Cut => self.standing == Standing::Shut,
        }
    }

    /// The server has answered what was asked at `sent`, when control was heard, or not.
    pub fn answered(&mut self, answer: Answer, sent: Moment, is_heard: bool) {
        // Another server may have been asked, whose history is not this one's.
        if sent < self.since {
            return;
        }
        let Standing::Open { open, proven, timeline } = &mut self.standing else { return };
        let is_as_told = !answer.is_in_recovery && answer.is_read_only != open.state.takes_writes();
        if is_heard && is_as_told {
            timeline.get_or_insert(answer.timeline);
        }
        if is_as_told && *timeline == Some(answer.timeline) {
            *proven = (*proven).max(sent);
        }
    }

    /// The server is to be asked: to know it again, or as nobody else has proven anything for a while.
    pub fn asks(&self, now: Moment, terms: Terms) -> Option<&Open> {
        match &self.standing {
            Standing::Open { open, proven, timeline } => {
                let is_doubtful = now >= proven.plus(terms.renew_every() * 3 / 2);
                (is_doubtful || timeline.is_none()).then_some(open)
            }
            Standing::Shut | Standing::Ordered => None,
        }
    }

    /// An order was obeyed at `now`, by the answer of control to what was asked at `by`.
    pub fn obeyed(&mut self, order: &Barrier, by: Moment, now: Moment) {
        self.standing = match order {
            Barrier::Hold { .. } | Barrier::Cut { .. } => Standing::Ordered,
            Barrier::GiveUp { .. } => Standing::Shut,
            Barrier::Release { to, state, epoch, .. } => {
                self.seen = self.seen.max(*epoch);
                let open = Open { cell: to.clone(), state: *state, epoch: *epoch };
                Standing::Open { open, proven: by, timeline: None }
            }
            _ => return,
        };
        self.wanted = None;
        self.since = now;
    }

    /// Whether an order is of an epoch that is not over.
    ///
    /// # Errors
    /// A later one was seen.
    pub fn check(&self, order: &Barrier) -> Result<(), String> {
        match order {
            Barrier::Release { epoch, .. } if *epoch < self.seen => {
                Err(format!("it is of epoch {epoch}, and epoch {} was seen", self.seen))
            }
            _ => Ok(()),
        }
    }

    /// Time has passed.
    pub fn at(&mut self, now: Moment, contact: &Contact) -> Option<Action> {
        match &self.standing {
            Standing::Open { proven, .. }
                if contact.terms().is_none_or(|terms| now >= terms.stop_at(*proven)) =>
            {
                self.standing = Standing::Shut;
                Some(Action::Cut)
            }
            // Until that is done.
            Standing::Ordered if contact.is_lost(now) => Some(Action::GiveUp),
            Standing::Open { .. } | Standing::Ordered | Standing::Shut => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TERMS: Terms = Terms { length: Duration::from_millis(2_500) };

    fn ms(ms: u64) -> Moment {
        Moment(Duration::from_millis(ms))
    }

    fn open(cell: &str, state: CellState, epoch: u64) -> Open {
        Open { cell: cell.into(), state, epoch: Epoch(epoch) }
    }

    fn release(open: &Open) -> Barrier {
        let Open { cell, state, epoch } = open.clone();
        Barrier::Release { app: "shop".into(), to: cell, state, epoch }
    }

    fn cut() -> Barrier {
        Barrier::Cut { app: "shop".into() }
    }

    /// One that serves, by what was asked at 0.
    fn serving(open: &Open) -> (Follower, Contact) {
        let (mut follower, mut contact) = (Follower::default(), Contact::default());
        contact.answered(ms(0), TERMS, ms(1));
        assert_eq!(
            follower.told(&Route::Open(open.clone()), ms(0)),
            Some(Action::Release(open.clone()))
        );
        follower.obeyed(&release(open), ms(0), ms(1));
        (follower, contact)
    }

    #[test]
    fn nobody_is_served_without_a_proof() {
        let active = open("a", CellState::Active, 3);
        let (mut follower, contact) = serving(&active);
        assert_eq!(follower.at(ms(2_249), &contact), None);
        assert_eq!(follower.at(ms(2_250), &contact), Some(Action::Cut));
        assert_eq!(follower.open(), None);
        assert_eq!(follower.at(ms(2_251), &contact), None);
        let again = follower.told(&Route::Open(active.clone()), ms(9_000));
        assert_eq!(again, Some(Action::Release(active)));
    }

    #[test]
    fn nothing_passes_when_nobody_would_be_served() {
        let active = open("a", CellState::Active, 3);
        let (mut follower, mut contact) = serving(&active);
        assert_eq!(follower.passes_until(&contact), Some(ms(2_250)));
        contact.answered(ms(1_000), TERMS, ms(1_001));
        // Control was heard, but has not said that this is still so.
        assert_eq!(follower.told(&Route::Held, ms(1_000)), None);
        assert_eq!(follower.passes_until(&contact), Some(ms(2_250)));
        follower.obeyed(&cut(), ms(1_000), ms(1_100));
        assert_eq!(follower.passes_until(&contact), Some(ms(3_250)));
        follower.obeyed(&Barrier::GiveUp { app: "shop".into() }, ms(1_000), ms(1_200));
        assert_eq!(follower.passes_until(&contact), None);
    }

    #[test]
    fn the_server_proves_it_too_as_long_as_it_is_the_same() {
        let as_is = Answer { is_in_recovery: false, timeline: 4, is_read_only: false };
        let (mut follower, contact) = serving(&open("a", CellState::Active, 3));
        // Of a server that was never asked while control was heard nothing is known.
        follower.answered(as_is, ms(2_000), false);
        assert!(follower.asks(ms(0), TERMS).is_some());
        follower.answered(as_is, ms(100), true);
        assert!(follower.asks(ms(1_037), TERMS).is_none());
        assert!(follower.asks(ms(1_038), TERMS).is_some());
        follower.answered(as_is, ms(2_000), false);
        assert_eq!(follower.at(ms(4_249), &contact), None);
        for other in [
            Answer { is_in_recovery: true, ..as_is },
            Answer { timeline: 5, ..as_is },
            Answer { is_read_only: true, ..as_is },
        ] {
            follower.answered(other, ms(4_000), false);
        }
        assert_eq!(follower.at(ms(4_250), &contact), Some(Action::Cut));
    }

    /// It was taken for that of the new server: whose own answers then proved nothing, once control was gone.
    #[test]
    fn the_answer_of_the_server_before_says_nothing_of_the_new_one() {
        let as_is = Answer { is_in_recovery: false, timeline: 4, is_read_only: false };
        let (mut follower, _) = serving(&open("a", CellState::Active, 3));
        follower.obeyed(&cut(), ms(100), ms(200));
        follower.obeyed(&release(&open("b", CellState::Active, 4)), ms(100), ms(300));
        follower.answered(as_is, ms(150), true);
        assert!(follower.asks(ms(301), TERMS).is_some());
        let there = Answer { timeline: 5, ..as_is };
        follower.answered(there, ms(400), true);
        follower.answered(there, ms(2_000), false);
        assert_eq!(follower.asks(ms(2_001), TERMS), None);
    }

    #[test]
    fn a_change_that_was_missed_is_made_up_for() {
        let (mut follower, _) = serving(&open("a", CellState::Active, 3));
        assert_eq!(follower.told(&Route::Held, ms(500)), None);
        let there = open("b", CellState::Active, 4);
        assert_eq!(follower.told(&Route::Open(there.clone()), ms(600)), Some(Action::Cut));
        let next = follower.told(&Route::Open(there.clone()), ms(1_200));
        assert_eq!(next, Some(Action::Release(there.clone())));
        follower.obeyed(&release(&there), ms(1_200), ms(1_201));
        // Nothing of an epoch that is over is obeyed, nor believed.
        assert!(follower.check(&release(&open("a", CellState::Active, 3))).is_err());
        assert_eq!(follower.told(&Route::Open(open("a", CellState::Active, 3)), ms(1_800)), None);
        assert_eq!(follower.open(), Some(&there));
    }

    #[test]
    fn answers_and_orders_may_overtake_each_other() {
        let active = open("a", CellState::Active, 3);
        let (mut follower, mut contact) = serving(&active);
        follower.obeyed(&cut(), ms(0), ms(700));
        // Asked before, answered after.
        assert_eq!(follower.told(&Route::Open(active.clone()), ms(600)), None);
        let fenced = open("a", CellState::Fenced, 3);
        follower.obeyed(&release(&fenced), ms(600), ms(900));
        assert_eq!(follower.told(&Route::Open(active.clone()), ms(800)), None);
        assert_eq!(follower.open(), Some(&fenced));
        // The order to let sessions go was lost.
        follower.obeyed(&cut(), ms(600), ms(1_000));
        let freed = Action::Release(active.clone());
        assert_eq!(follower.told(&Route::Open(active), ms(1_100)), Some(freed.clone()));
        assert!(follower.wants(&freed));
        // Before it was done, another order has come.
        follower.obeyed(&cut(), ms(1_100), ms(1_101));
        assert!(!follower.wants(&freed));
        // And here control.
        contact.answered(ms(1_100), TERMS, ms(1_101));
        assert_eq!(follower.at(ms(61_099), &contact), None);
        assert_eq!(follower.at(ms(61_100), &contact), Some(Action::GiveUp));
    }

    #[test]
    fn orders_do_not_outlive_the_contact() {
        let mut contact = Contact::default();
        let order = Order { id: 1, wait_max: Duration::from_secs(15), what: cut() };
        assert!(contact.check(&order, ms(0), ms(1)).is_err());
        contact.answered(ms(0), TERMS, ms(10));
        contact.answered(ms(600), TERMS, ms(610));
        assert_eq!(contact.check(&order, ms(100), ms(2_849)), Ok(()));
        assert!(contact.check(&order, ms(100), ms(2_850)).is_err());
        contact.answered(ms(3_000), TERMS, ms(3_010));
        assert!(contact.check(&order, ms(100), ms(3_020)).unwrap_err().contains("not heard since"));
        assert_eq!(contact.check(&order, ms(3_005), ms(3_020)), Ok(()));
        let late = Order { wait_max: Duration::from_millis(10), ..order };
        assert!(contact.check(&late, ms(3_005), ms(3_020)).unwrap_err().contains("10ms"));
    }

    #[test]
    fn names_are_no_paths() {
        assert!(is_name("p-2.eu_1"));
        for name in ["", "a/b", "a b", "é", &"x".repeat(NAME_LEN_MAX + 1)] {
            assert!(!is_name(name), "{name}");
        }
        assert_eq!((number_of(7), number_of(2 * SESSIONS_OF_ONE + 7)), (0, 2));
    }

    proptest! {
        /// Control fences the server at `fence` without this proxy. Whatever of questions to control and to the server was
        /// answered, late or never, and however the proxy's clock drifts: once the length of a lease has passed, nobody is
        /// served by what was before.
        #[test]
        fn never_more_permissive_for_longer_than_a_lease(
            fence in 1_000u64..20_000,
            drift in 950u64..1_050,
            asks in proptest::collection::vec((0u64..1_000, any::<bool>(), 0u64..800, 0u64..800, any::<bool>()), 1..80),
        ) {
            let theirs = |at: u64| ms(77_000 + at * drift / 1_000);
            let before = open("a", CellState::Active, 3);
            let (mut follower, mut contact) = (Follower::default(), Contact::default());
            let mut at = 0;
            let (over, mut checked) = (fence + 2_600, false);
            for (wait, is_control, there, back, is_lost) in asks {
                at += wait;
                let sent = theirs(at);
                let asked_at = at + there;
                at = asked_at + back;
                if at >= over && !checked {
                    checked = true;
                    let mut then = follower.clone();
                    then.at(theirs(over), &contact);
                    prop_assert_eq!(then.open(), None);
                }
                if !is_lost && is_control {
                    contact.answered(sent, TERMS, theirs(at));
                    // Control says that it changes something before it begins.
                    let route = if asked_at < fence { Route::Open(before.clone()) } else { Route::Held };
                    if let Some(Action::Release(open)) = follower.told(&route, sent) {
                        follower.obeyed(&release(&open), sent, theirs(at));
                    }
                } else if !is_lost {
                    let answer = Answer { is_in_recovery: false, timeline: 1, is_read_only: asked_at >= fence };
                    follower.answered(answer, sent, contact.held(theirs(at)).is_some());
                }
                follower.at(theirs(at), &contact);
            }
            let over = over.max(at);
            follower.at(theirs(over), &contact);
            prop_assert_eq!(follower.open(), None);
        }
    }
}
