//! The connections that are open: at most so many in all, and so many of one client.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The bits of an IPv6 address that tell clients apart: a client mostly has a network of this size to itself.
const CLIENT_BITS: u32 = 64;

/// The places of connections.
#[derive(Debug)]
pub(super) struct Places {
    /// The number of open connections by client.
    taken: Mutex<Taken>,
    max: usize,
    max_per_client: usize,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    by_client: HashMap<IpAddr, usize>,
}

/// Why a connection gets no place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NoPlace {
    /// There are none left.
    Full,
    /// This client has as many as it may have.
    FullForClient,
}

/// The place of a connection, which is free again when this is dropped.
#[derive(Debug)]
pub(super) struct Place {
    places: Arc<Places>,
    client: IpAddr,
}

impl Places {
    pub(super) fn new(max: usize, max_per_client: usize) -> Arc<Self> {
        Arc::new(Self {
            taken: Mutex::default(),
            max,
            max_per_client,
        })
    }

    /// Takes a place for a connection from this address.
    pub(super) fn take(self: &Arc<Self>, address: IpAddr) -> Result<Place, NoPlace> {
        let client = client(address);
        let mut taken = self.taken();
        if taken.all >= self.max {
            return Err(NoPlace::Full);
        }
        let own = taken.by_client.entry(client).or_default();
        if *own >= self.max_per_client {
            return Err(NoPlace::FullForClient);
        }
        *own += 1;
        taken.all += 1;
        Ok(Place {
            places: Arc::clone(self),
            client,
        })
    }

    /// Returns how many connections are open.
    pub(super) fn open(&self) -> usize {
        self.taken().all
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.taken();
        taken.all -= 1;
        if let Some(own) = taken.by_client.get_mut(&self.client) {
            *own -= 1;
            if *own == 0 {
                taken.by_client.remove(&self.client);
            }
        }
    }
}

/// Returns what identifies the client of an address: the address itself, or its network if it is one of IPv6.
fn client(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let network = address.to_bits() >> (Ipv6Addr::BITS - CLIENT_BITS) << (Ipv6Addr::BITS - CLIENT_BITS);
            Ipv6Addr::from_bits(network).into()
        }
        address @ IpAddr::V4(_) => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_limited_in_all_and_for_each_client() {
        let places = Places::new(3, 2);
        let take = |address: &str| places.take(address.parse().unwrap());
        let first = take("10.0.0.1").unwrap();
        let second = take("::ffff:10.0.0.1").unwrap();
        assert_eq!(take("10.0.0.1").unwrap_err(), NoPlace::FullForClient);
        let other = take("10.0.0.2").unwrap();
        assert_eq!(take("10.0.0.3").unwrap_err(), NoPlace::Full);
        drop(first);
        assert_eq!(places.open(), 2);
        assert!(take("10.0.0.1").is_ok());
        drop((second, other));
        assert_eq!(places.open(), 0);
        assert!(places.taken().by_client.is_empty());
    }

    #[test]
    fn addresses_of_one_network_are_one_client() {
        let places = Places::new(10, 1);
        let take = |address: &str| places.take(address.parse().unwrap());
        let _first = take("2001:db8:0:1::1").unwrap();
        assert_eq!(take("2001:db8:0:1:ffff::2").unwrap_err(), NoPlace::FullForClient);
        assert!(take("2001:db8:0:2::1").is_ok());
    }
}
