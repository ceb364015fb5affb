//! A run's destination, wherever it is.

use pageferry::transport::uri::Uri;

use super::hosts::There;
use super::pair::{Here, Running};
use super::side::{DestinationOrder, Outcome, Place};

/// A destination that listens.
pub(super) enum Listening {
    /// On this host.
    Here(Here),
    /// On another one.
    There(There),
}

impl Listening {
    /// Starts a destination, on the host that listens at `host` if one is named.
    pub(super) fn start(
        host: Option<&Uri>,
        order: DestinationOrder,
        running: &Running,
    ) -> Result<Self, String> {
        match host {
            Some(host) => There::start(host, &order).map(Self::There),
            None => Here::start(order, running).map(Self::Here),
        }
    }

    /// Where it listens.
    pub(super) fn place(&self) -> &Place {
        match self {
            Self::Here(here) => &here.place,
            Self::There(there) => &there.place,
        }
    }

    /// What its run came to.
    pub(super) fn outcome(&mut self) -> Result<Outcome, String> {
        match self {
            Self::Here(here) => here.outcome(),
            Self::There(there) => there.outcome(),
        }
    }
}
