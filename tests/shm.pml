/* The slot protocol of the shared-memory transport (lorasync.h, room >>shm), for the model checker spin: publishers that want the one place,
   readers, three slots, and a killer that ends any process between any two steps. What is killed comes back as a new process.

       here                 in lorasync.h
       lock                 lorasynci_life_begin: a lock that the kernel drops when its process ends
       claim, disown        lorasynci_shm_claim, lorasynci_shm_disown, for the publisher's place and for a reader's
       bury                 lorasynci_shm_reader_lives
       look, pick           lorasynci_shm_is_used, lorasynci_shm_pick
       write                lorasynci_shm_fill; each slot has two halves, written one after the other
       commit               the store in lorasynci_shm_commit
       pin, unpin           lorasynci_shm_pin, lorasynci_shm_unpin
       poll                 lorasynci_poll_place

   Every step is one sequentially consistent load, store or read-modify-write of shared memory, as in the C code. Asserted:
       - no mixed version: both halves of what a reader has pinned are of one version, for as long as it is pinned
       - no lost version: a poll ends with a version no older than the one that was committed when it began; readers never go back
       - at most one living publisher works

   Each of these breaks it, and must be found: -DNO_RECHECK (a pin is not checked again), -DCLEAR_PINS (the publisher clears a dead reader's pins
   after it has given up its lock), -DEARLY_COMMIT (commit before the second half is written), -DLOOK_BEFORE (the pins are looked at before the
   commit that takes the slot out of service), -DBURY_UNLOCKED (a reader's place is taken away without holding its lock: the reader may have
   closed and opened again meanwhile, and its word is the same). */

#define SLOTS 3
#ifndef PUBLISHERS
#define PUBLISHERS 1
#endif
#ifndef READERS
#define READERS 2
#endif
#ifndef VERSIONS
#define VERSIONS 3
#endif
#ifndef KILLS
#define KILLS 1
#endif
#ifndef CLOSES
#define CLOSES 0 /* how often a reader closes, and opens again as the same process */
#endif
#define FIRST_ID (1 + PUBLISHERS + READERS) /* those before it start living */
#define IDS 9
#define NONE 255
#define BIT(s) (1 << (s))
#define SLOT_OF(w) ((w) % 4 - 1)

/* the control */
byte word;           /* number * 4 + slot + 1; 0: nothing is published */
byte publisher;      /* owners are process ids */
byte owner[READERS];
byte publisher_lock; /* who has locked the byte of a place: for nobody who lives, the kernel has dropped it */
byte lock[READERS];
byte pins[READERS];

/* the slots */
byte first_half[SLOTS], second_half[SLOTS];

/* processes */
byte ids = FIRST_ID;
bool alive[IDS];

/* what the assertions need */
byte committed; /* version */
byte working;   /* the publisher that claimed last */

/* Who was killed comes back under a new id. */
inline begin_again(me)
{
    me = ids; ids++; alive[me] = true
}

#define FREE(l) ((l) == 0 || !alive[l])

/* Leaves `got` true when the place is ours. */
inline claim(place, its_lock, me, got)
{
    atomic { if :: FREE(its_lock) -> its_lock = me; got = true :: else fi };
    if :: got -> place = me :: else fi
}

/* The owner goes before the lock: who has the lock next has the place to itself. */
inline disown(place, its_lock)
{
    place = 0;
    its_lock = 0
}

/* Takes the place from a reader that is dead. */
inline bury(r, me)
{
#ifdef BURY_UNLOCKED
    if :: FREE(lock[r]) -> skip;
#else
    if :: atomic { FREE(lock[r]) -> lock[r] = me };
#endif
          atomic { if :: owner[r] == old -> owner[r] = 0 :: else fi };
#ifndef BURY_UNLOCKED
          lock[r] = 0;
#endif
#ifdef CLEAR_PINS
          pins[r] = 0;
#endif
       :: else
    fi
}

/* Marks in `used` what the living pin. */
inline look_at_reader(r, me)
{
    old = owner[r];
    if
    :: old != 0 -> bury(r, me); old = owner[r] /* the second look: the first one does not ask who lives */
    :: true
    fi;
    atomic { if :: old != 0 -> used = used | pins[r] :: else fi; old = 0 }
}

proctype Publisher(byte me)
{
    byte old, used, slot, version, before;
    bool got;
again:
    {
        do
        :: got -> break
        :: !got && FREE(publisher_lock) -> claim(publisher, publisher_lock, me, got)
        od;
        atomic { assert(working == 0 || !alive[working]); working = me };
end:    do
        :: committed < VERSIONS ->
            /* look: first the word, then the pins of those who live */
#ifdef LOOK_BEFORE
            used = before | (word == 0 -> 0 : BIT(SLOT_OF(word)));
#else
            used = (word == 0 -> 0 : BIT(SLOT_OF(word)));
            look_at_reader(0, me);
#if READERS == 2
            look_at_reader(1, me);
#endif
#endif
            /* pick any; without one the C code makes another slot, here it looks again */
            atomic {
                if
                :: !(used & BIT(0)) -> slot = 0
                :: !(used & BIT(1)) -> slot = 1
                :: !(used & BIT(2)) -> slot = 2
                :: used == 7 -> slot = NONE
                fi;
                used = 0
            };
#ifdef LOOK_BEFORE
            look_at_reader(0, me);
#if READERS == 2
            look_at_reader(1, me);
#endif
            before = used; used = 0;
#endif
            if
            :: slot != NONE ->
                /* write */
                atomic { version = (word == 0 -> 1 : first_half[SLOT_OF(word)] + 1); first_half[slot] = version };
#ifndef EARLY_COMMIT
                second_half[slot] = version;
#endif
                /* commit */
                atomic {
                    word = (word / 4 + 1) * 4 + slot + 1;
                    assert(version == committed + 1);
                    committed = version
                };
#ifdef EARLY_COMMIT
                second_half[slot] = version;
#endif
            :: else
            fi;
            atomic { slot = 0; version = 0 }
        od
    } unless { !alive[me] };
    atomic { old = 0; used = 0; slot = 0; version = 0; before = 0; got = false; begin_again(me) };
    goto again
}

proctype Reader(byte me)
{
    byte r, w, seen, slot, version, have, have_version, at_start, closes;
    bool got;
again:
    {
open:
        do
        :: got -> break
        :: !got -> claim(owner[r], lock[r], me, got); atomic { if :: !got -> r = (r + 1) % READERS :: got fi }
        od;
        atomic { pins[r] = 0; /* a dead reader's */ have = NONE };
end:    do
        :: /* poll */
            atomic { word != seen; at_start = committed; w = word };
            do
            :: pins[r] = pins[r] | BIT(SLOT_OF(w));
#ifdef NO_RECHECK
               break
#else
               if
               :: word == w -> break
               :: else -> pins[r] = pins[r] & ~BIT(SLOT_OF(w)); w = word
               fi
#endif
            od;
            atomic { slot = SLOT_OF(w); version = first_half[slot] };
            atomic {
                assert(version == second_half[slot]);
                assert(version >= at_start && version > have_version);
            };
            atomic {
                if
                :: have != NONE -> pins[r] = pins[r] & ~BIT(have)
                :: else
                fi;
                have = slot; have_version = version; seen = w;
                at_start = 0; w = 0; version = 0; slot = 0
            }
        :: atomic { have != NONE -> /* nothing new, and what is pinned is whole, at any time */
            assert(word != seen || have_version >= committed);
            assert(first_half[have] == have_version && second_half[have] == have_version) }
#if CLOSES
        :: closes < CLOSES && have != NONE ->
            pins[r] = pins[r] & ~BIT(have);
            disown(owner[r], lock[r]);
            atomic { closes++; r = 0; seen = 0; have = 0; have_version = 0; got = false };
            goto open
#endif
        od
    } unless { !alive[me] };
    atomic { r = 0; w = 0; seen = 0; slot = 0; version = 0; have = 0; have_version = 0; at_start = 0; got = false; begin_again(me) };
    goto again
}

proctype Killer()
{
    byte kills;
    do
    :: atomic { kills < KILLS && alive[1] -> alive[1] = false; kills++ }
    :: atomic { kills < KILLS && alive[2] -> alive[2] = false; kills++ }
    :: atomic { kills < KILLS && alive[3] -> alive[3] = false; kills++ }
    :: atomic { kills < KILLS && alive[4] -> alive[4] = false; kills++ }
    :: atomic { kills < KILLS && alive[5] -> alive[5] = false; kills++ }
    :: kills == KILLS -> break
    od
}

init
{
    atomic {
#ifdef PUBLISHED /* version 1 is there when it begins */
        word = 5; first_half[0] = 1; second_half[0] = 1; committed = 1;
#endif
        run Publisher(1);
        alive[1] = true;
#if PUBLISHERS == 2
        run Publisher(2);
        alive[2] = true;
#endif
        run Reader(PUBLISHERS + 1);
        alive[PUBLISHERS + 1] = true;
#if READERS == 2
        run Reader(PUBLISHERS + 2);
        alive[PUBLISHERS + 2] = true;
#endif
        run Killer()
    }
}
