//! Two hosts with one key, as a virtual machine and its clone: told apart by what each agent draws when it starts.
//!
//! An agent that was restarted leaves a connection that dies within seconds. So two agents count as two hosts only when both
//! have live connections for longer than that. Until the older one is gone, nothing that the newer one says of itself is
//! believed; and once they count as two, there is no session with either, since nobody knows which of them it would be
//! with. Their connections stay: they tell when one is gone.

use blockmirror_protocol::units::HostId;
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// How long a connection may seem live whose other end is gone, and some more.
const GONE_TIME: Duration = Duration::from_secs(10);

/// A connection by which an agent was heard.
pub(super) trait Heard {
    /// Whether it is live.
    fn is_live(&self) -> bool;
    /// Where the agent is.
    fn address(&self) -> String;
    /// A number that tells it from others.
    fn number(&self) -> usize;
}

impl Heard for crate::transport::Connection {
    fn is_live(&self) -> bool {
        Self::is_live(self)
    }

    fn address(&self) -> String {
        self.remote_address().to_string()
    }

    fn number(&self) -> usize {
        Self::number(self)
    }
}

struct Instance<Connection> {
    number: [u8; 16],
    connections: Vec<Connection>,
    since: Instant,
}

/// The agents that were heard with each key.
pub(super) struct Instances<Connection = crate::transport::Connection> {
    heard: HashMap<HostId, Vec<Instance<Connection>>>,
}

impl<Connection> Default for Instances<Connection> {
    fn default() -> Self {
        Self { heard: HashMap::new() }
    }
}

impl<Connection: Heard> Instances<Connection> {
    /// An agent was heard on a connection. Says whether it is the only one with its key that is live. A connection is one
    /// agent's, however often it is heard on it and whatever else it calls itself: so there are no more than connections (X1).
    pub(super) fn hear(
        &mut self,
        host: HostId,
        number: [u8; 16],
        connection: Connection,
        now: Instant,
    ) -> bool {
        let known = self.live(host);
        let mut connections = known.iter().flat_map(|instance| &instance.connections);
        if connections.any(|known| known.number() == connection.number()) {
            return known.len() == 1;
        }
        match known.iter_mut().find(|instance| instance.number == number) {
            Some(instance) => instance.connections.push(connection),
            None => known.push(Instance { number, connections: vec![connection], since: now }),
        }
        known.len() == 1
    }

    /// Where the two hosts are that use one key, if two do.
    pub(super) fn twins(&mut self, host: HostId, now: Instant) -> Option<(String, String)> {
        let [first, .., last] = &self.live(host)[..] else { return None };
        let are_two = now.saturating_duration_since(last.since) >= GONE_TIME;
        let address = |instance: &Instance<Connection>| instance.connections.first().map(Heard::address);
        address(first).zip(address(last)).filter(|_| are_two)
    }

    fn live(&mut self, host: HostId) -> &mut Vec<Instance<Connection>> {
        let known = self.heard.entry(host).or_default();
        for instance in known.iter_mut() {
            instance.connections.retain(Heard::is_live);
        }
        known.retain(|instance| !instance.connections.is_empty());
        known
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::rc::Rc;

    struct Line(&'static str, Rc<Cell<bool>>, usize);

    impl Heard for Line {
        fn is_live(&self) -> bool {
            self.1.get()
        }

        fn address(&self) -> String {
            self.0.to_owned()
        }

        fn number(&self) -> usize {
            self.2
        }
    }

    #[test]
    fn two_agents_with_one_key_count_as_two_hosts_only_when_both_go_on() {
        let (host, began) = (HostId([1; 32]), Instant::now());
        let mut instances = Instances::default();
        let line = |at| (Rc::new(Cell::new(true)), at);
        let [(first, _), (second, _)] = [line("a"), line("b")];
        assert!(instances.hear(host, [1; 16], Line("a:1", first.clone(), 1), began));
        assert!(instances.hear(host, [1; 16], Line("a:1", first.clone(), 1), began), "it is the same one");
        // A restart, whose old connection is noticed to be dead a moment later.
        assert!(!instances.hear(host, [2; 16], Line("b:1", second.clone(), 2), began));
        assert_eq!(instances.twins(host, began + Duration::from_secs(5)), None);
        let later = began + GONE_TIME;
        assert_eq!(instances.twins(host, later), Some(("a:1".to_owned(), "b:1".to_owned())));
        first.set(false);
        assert_eq!(instances.twins(host, later), None, "one is gone");
        assert!(instances.hear(host, [2; 16], Line("b:1", second, 3), later));
    }

    /// Each word that it said of itself was kept, and so was each name that it gave itself.
    #[test]
    fn an_agent_that_says_who_it_is_without_end_takes_no_more_room() {
        let (host, now, live) = (HostId([1; 32]), Instant::now(), Rc::new(Cell::new(true)));
        let mut instances = Instances::default();
        for number in 0..100 {
            for connection in 0..4 {
                instances.hear(host, [number; 16], Line("a:1", live.clone(), connection), now);
            }
        }
        let heard: Vec<usize> =
            instances.heard[&host].iter().map(|instance| instance.connections.len()).collect();
        assert_eq!(heard, [4]);
    }
}
