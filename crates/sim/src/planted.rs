//! Faults of ours: each makes an invariant fire, or the invariant is worth nothing.

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Planted {
    /// A failover does not wait until the lost cell's lease is over.
    LeaseNotWaitedFor,
    /// Nor has its target refuse what it has pledged.
    PledgesNotEnded,
    /// A node takes the seat as soon as it finds that it is another's.
    SeatTakenEarly,
    /// Transactions do not compare the seat.
    SeatNotCompared,
    /// Nobody pleads while control is gone.
    NobodyPleads,
    /// A new control takes it that no lease was given before, and listens for nobody first. (The first alone does no harm here.)
    GrantsForgotten,
    /// The highest epoch is not on the agent's disk.
    EpochNotKept,
    /// What clients send passes a proxy whether it is proven or not.
    ProofNotAsked,
    /// A fence leaves earlier connections of ours as they are.
    LateSql,
    /// An order goes on to a step that never comes.
    StepLost,
}
