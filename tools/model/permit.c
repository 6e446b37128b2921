/* An explicit-state model of the permit protocol: explores every interleaving of a small pool.
 *
 * One move is one store to shared memory, one load that matters, or one semaphore operation.  Any process may be
 * killed, and any bracket may be abandoned, between any two moves; a new coordinator adopts what it finds.  The
 * search is breadth-first, so a violation comes with one of the shortest traces that lead to it.
 *
 * The parts follow the code: the worker's half is shmpool/slots.py, rows are shmpool/rows.py, the coordinator's half
 * is coordinator/shmpool_coordinator/permits.py and reaper.py, the words are shmpool/words.py, and what is checked
 * is shmpool/invariants.py.  README.md tells how to run it, and lists the deliberate mistakes.
 *
 * Exit code: 0 everything explored, 1 violation, 2 more states than the bound.
 */
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- configuration: -DNAME=value ------------------------------------------------------------------------------ */

#ifndef WORKERS
#define WORKERS 2 /* worker rows, each with one process at a time */
#endif
#ifndef SLOTS
#define SLOTS 1 /* slots of a row: threads, or brackets nested in one thread */
#endif
#ifndef GROUPS
#define GROUPS 1
#endif
#ifndef ENDPOINTS
#define ENDPOINTS 1
#endif
#ifndef GROUP_CAP
#define GROUP_CAP 1
#endif
#ifndef GROUP_CAP2
#define GROUP_CAP2 GROUP_CAP /* where it differs, the target moves between the two at any time */
#endif
#ifndef ENDPOINT_CAP
#define ENDPOINT_CAP 1
#endif
#ifndef ENDPOINT_CAP2
#define ENDPOINT_CAP2 ENDPOINT_CAP
#endif
#ifndef ABANDON
#define ABANDON 1 /* exceptions inside brackets, dropped tokens, sessions that would not end */
#endif
#ifndef OWED
#define OWED 0 /* workers may leave a surplus to the coordinator (slots.py: _is_owed) */
#endif
#ifndef AUDIT_ALWAYS
#define AUDIT_ALWAYS 0 /* audit also where nothing is uncertain */
#endif
#ifndef MAX_STATES
#define MAX_STATES 60000000u
#endif

/* Deliberate mistakes, one at a time: -DMISTAKE=NAME.  Each has to end in a violation. */
#define NO_MISTAKE 0
#define TOUCH_BEFORE_RECORD 1
#define FREE_BEFORE_POSTS 2
#define GO_ON_AFTER_ABANDON 3
#define TAKE_DIRTY_ROW 4
#define REAP_THE_LIVING 5
#define SETTLE_WITHOUT_RECORD 6
#define GROUP_WAITS_FOR_ENDPOINT 7
#define COMPARE_MENTIONS 8
#define NO_SEQUENCE 9
#define VALUE_AFTER_COPIES 10
#define IGNORE_LIVE 11
#define WAIT_FOR_LIVE 12
#define REREAD_TABLE 13
#define MARK_BEFORE_POST 14
#define MARK_BOTH_FIELDS 15
#define ABSORB_LAST 16
#define GROW_WITHOUT_PENDING 17
#define SHRINK_WITHOUT_PENDING 18
#ifndef MISTAKE
#define MISTAKE NO_MISTAKE
#endif
enum { mistake = MISTAKE }; /* a name that does not exist fails here; the preprocessor alone would take it for 0 */

#define ALL_SLOTS (WORKERS * SLOTS)
#define SEMAPHORES (GROUPS + ENDPOINTS) /* numbered as the PERMITS table: groups first, then endpoints */
_Static_assert(GROUPS <= 2 && ENDPOINTS <= 2, "an index has one bit");
_Static_assert(ALL_SLOTS <= 8, "a set of slots is a byte");
_Static_assert(GROUP_CAP <= 7 && GROUP_CAP2 <= 7 && ENDPOINT_CAP <= 7 && ENDPOINT_CAP2 <= 7, "a count has four bits");

/* ---- slot words: shmpool/words.py ----------------------------------------------------------------------------- */

enum { NONE, MAYBE, YES };
typedef uint8_t Word; /* ORPHAN:1, E field:2, E index:1, G field:2, G index:1; the sequence is Coordinator.changed */
#define ORPHAN 1
#define FREE 0
#define NOT_AN_INDEX 0 /* beside NONE */

static Word word_of(int group, int group_field, int endpoint, int endpoint_field) {
    return (Word)(endpoint_field << 1 | endpoint << 3 | group_field << 4 | group << 6);
}
static int endpoint_field(Word word) { return word >> 1 & 3; }
static int endpoint_index(Word word) { return word >> 3 & 1; }
static int group_field(Word word) { return word >> 4 & 3; }
static int group_index(Word word) { return word >> 6 & 1; }
static bool is_orphan(Word word) { return word & ORPHAN; }
static bool is_free(Word word) { return !group_field(word) && !endpoint_field(word); }
static bool is_group(int x) { return x < GROUPS; }

/* The field of semaphore x in a word. */
static int field(Word word, int x) {
    if (is_group(x)) return group_index(word) == x ? group_field(word) : NONE;
    return endpoint_index(word) == x - GROUPS ? endpoint_field(word) : NONE;
}
static bool certain(Word word, int x) { return field(word, x) == YES; }
static bool unknown(Word word, int x) { return field(word, x) == MAYBE; }

/* words.py: with_field.  NONE takes its index along, and the last field ORPHAN. */
static Word with_field(Word word, int x, int value) {
    int g = group_field(word), e = endpoint_field(word);
    if (is_group(x)) g = value;
    else e = value;
    if (!g && !e) return FREE;
    return word_of(g ? group_index(word) : NOT_AN_INDEX, g, e ? endpoint_index(word) : NOT_AN_INDEX, e) |
           (word & ORPHAN);
}

/* ---- the state of everything ---------------------------------------------------------------------------------- */

/* Where a thread stands in its bracket, that is: which move comes next. */
enum place {
    AT_REST, /* outside: FREE, (g,-) waiting for an endpoint, (g,e) connected, or an orphan that is away */
    CLAIM_TAKE_GROUP,
    CLAIM_GOT_GROUP,
    CLAIM_GROUP_BUSY,
    CLAIM_TAKE_ENDPOINT,
    CLAIM_GOT_ENDPOINT,
    CLAIM_ENDPOINT_BUSY,
    GIVE_UP_POST,
    RELEASE_POST_ENDPOINT,
    RELEASE_POST_GROUP,
    STORE_FREE, /* the last store of give_up and release */
};
static const char *const PLACES[] = {"rest",         "take G",  "got G",  "G busy", "take E",    "got E",
                                     "E busy",       "post G",  "post E", "post G", "store FREE"};

enum owner { ALIVE, DEAD, TAKING, REAPING }; /* who has a row's lock: a worker, nobody, a newcomer, the coordinator */

enum task {
    IDLE,
    REAP,
    SETTLE_GIVE,
    SETTLE_MARK,
    AUDIT_COPY,
    AUDIT_VALUE,
    AUDIT_COMPARE,
    AUDIT_ABSORB,
    AUDIT_POST,
    AUDIT_MARK,
    AUDIT_IMPOSSIBLE, /* out of bounds: a violation, never left */
    GROW_POST,
    GROW_DONE,
    SHRINK_TAKE,
    SHRINK_TOOK,
    SHRINK_BUSY,
};

typedef struct {
    uint8_t place : 5;
    uint8_t tried : 2; /* the endpoints that this claim has found busy */
} Thread;

typedef struct {
    uint8_t value : 4;
    uint8_t issued : 4, pending : 4, target : 4; /* the control word */
} Permits;

/* What the coordinator has in its own memory; a kill forgets it.  What a task does not use is 0. */
typedef struct {
    uint8_t task;
    uint8_t x;       /* the semaphore it is about */
    uint8_t at;      /* slot, or row (REAP), or the next slot to copy or compare */
    uint8_t members; /* audit: slots that the first copy showed as orphans; nobody else writes those */
    uint8_t changed; /* audit: slots stored to since they were copied, which is what the sequence shows */
    uint8_t value : 4, certain : 4;
    uint8_t live : 4, absorb : 4;
    uint8_t post : 4, mark : 4;
#if MISTAKE == NO_SEQUENCE || MISTAKE == COMPARE_MENTIONS
    Word copy[ALL_SLOTS];
#endif
} Coordinator;

typedef struct {
    Word word[ALL_SLOTS];
    Thread thread[ALL_SLOTS];
    uint8_t row[WORKERS];
    Permits permits[SEMAPHORES];
    Coordinator coordinator;
} State;

static int surplus(const Permits *p) { return p->issued > p->target ? p->issued - p->target : 0; }

static bool is_copied_and_not_compared(const Coordinator *c, int slot) {
    switch (c->task) {
    case AUDIT_COPY: return slot < c->at;
    case AUDIT_VALUE: return true;
    case AUDIT_COMPARE: return slot >= c->at;
    default: return false;
    }
}

/* The one way to write a slot word. */
static void store(State *s, int slot, Word word) {
    s->word[slot] = word;
    if (is_copied_and_not_compared(&s->coordinator, slot)) s->coordinator.changed |= 1 << slot;
}

/* ---- moves ---------------------------------------------------------------------------------------------------- */

#define MAX_MOVES 512
#define LABEL 96
typedef struct {
    int count;
    bool is_told; /* write labels, for a trace */
    State next[MAX_MOVES];
    char label[MAX_MOVES][LABEL];
} Moves;

__attribute__((format(printf, 3, 4))) static void move(Moves *moves, const State *next, const char *format, ...) {
    if (moves->count == MAX_MOVES) abort();
    moves->next[moves->count] = *next;
    if (moves->is_told) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(moves->label[moves->count], LABEL, format, arguments);
        va_end(arguments);
    }
    moves->count++;
}

static const char *name(int x) { /* of a semaphore */
    static const char *const groups[] = {"G0", "G1"}, *const endpoints[] = {"E0", "E1"};
    return is_group(x) ? groups[x] : endpoints[x - GROUPS];
}

static const char *text(Word word) {
    static char texts[4][24];
    static int turn;
    char *out = texts[turn++ & 3], g[4] = "-", e[4] = "-";
    if (group_field(word)) snprintf(g, sizeof g, "g%d%s", group_index(word), group_field(word) == MAYBE ? "?" : "");
    if (endpoint_field(word))
        snprintf(e, sizeof e, "e%d%s", endpoint_index(word), endpoint_field(word) == MAYBE ? "?" : "");
    snprintf(out, sizeof texts[0], "(%s,%s)%s", g, e, is_orphan(word) ? "|ORPHAN" : "");
    return is_free(word) && !is_orphan(word) ? "FREE" : out;
}

/* ---- the worker: shmpool/slots.py ----------------------------------------------------------------------------- */

/* Store a word and stand at a place. */
static void step(Moves *moves, const State *s, int slot, Word word, int place, int tried, const char *what) {
    State t = *s;
    store(&t, slot, word);
    t.thread[slot] = (Thread){.place = place, .tried = tried};
    move(moves, &t, "slot %d: %s: store %s", slot, what, text(word));
}

/* T(x): a non-blocking acquire. */
static void take(Moves *moves, const State *s, int slot, int x, int got, int busy, int tried_if_busy) {
    State t = *s;
    bool is_there = t.permits[x].value > 0;
    if (is_there) t.permits[x].value--;
    t.thread[slot] = (Thread){.place = is_there ? got : busy, .tried = is_there ? 0 : tried_if_busy};
    move(moves, &t, "slot %d: claim: take %s: %s", slot, name(x), is_there ? "got it" : "busy");
}

/* P(x). */
static void post(Moves *moves, const State *s, int slot, int x, int then) {
    State t = *s;
    t.permits[x].value++;
    t.thread[slot].place = then;
    move(moves, &t, "slot %d: post %s", slot, name(x));
}

/* SlotTable._is_owed */
static bool is_owed(const State *s, int x) {
    return surplus(&s->permits[x]) > 0 && s->permits[x].value <= surplus(&s->permits[x]);
}

/* SlotTable.claim: its first store.  That `owed(g)` may turn it away needs no move: it then does nothing. */
static void claim(Moves *moves, const State *s, int slot) {
    for (int g = 0; g < GROUPS; g++) {
        if (mistake == TOUCH_BEFORE_RECORD) {
            take(moves, s, slot, g, CLAIM_GOT_GROUP, CLAIM_GROUP_BUSY, 0);
            continue;
        }
        step(moves, s, slot, word_of(g, MAYBE, NOT_AN_INDEX, NONE), CLAIM_TAKE_GROUP, 0, "claim");
    }
}

/* SlotTable._claim_endpoint: one more endpoint, in any order; (g,-) when there is none left. */
static void claim_endpoint(Moves *moves, const State *s, int slot, int tried) {
    int g = group_index(s->word[slot]);
    bool may_stop = true;
    for (int e = 0; e < ENDPOINTS; e++) {
        if (tried >> e & 1) continue;
        step(moves, s, slot, word_of(g, YES, e, MAYBE), CLAIM_TAKE_ENDPOINT, tried, "claim");
        if (!OWED || !is_owed(s, GROUPS + e)) may_stop = false;
    }
    if (may_stop) step(moves, s, slot, word_of(g, YES, NOT_AN_INDEX, NONE), AT_REST, 0, "claim waits");
}

/* SlotTable.give_up */
static void give_up(Moves *moves, const State *s, int slot) {
    Word word = word_of(group_index(s->word[slot]), MAYBE, NOT_AN_INDEX, NONE);
    step(moves, s, slot, word, GIVE_UP_POST, 0, "give up");
}

/* SlotTable.release */
static void release(Moves *moves, const State *s, int slot) {
    Word word = s->word[slot];
    word = word_of(group_index(word), MAYBE, endpoint_index(word), MAYBE);
    if (mistake == FREE_BEFORE_POSTS) word = FREE;
    step(moves, s, slot, word, RELEASE_POST_ENDPOINT, 0, "release");
}

/* SlotTable.abandon, and the exception handlers of the brackets. */
static void abandon(Moves *moves, const State *s, int slot) {
    int place = mistake == GO_ON_AFTER_ABANDON ? s->thread[slot].place : AT_REST;
    if (ABANDON) step(moves, s, slot, s->word[slot] | ORPHAN, place, 0, "abandon");
}

static void begin_bracket(Moves *moves, const State *s, int slot) {
    Word word = s->word[slot];
    if (is_orphan(word)) return;
    if (is_free(word)) {
        claim(moves, s, slot);
    } else if (group_field(word) == YES && endpoint_field(word) == NONE) {
        claim_endpoint(moves, s, slot, 0);
        give_up(moves, s, slot);
        abandon(moves, s, slot);
    } else if (group_field(word) == YES && endpoint_field(word) == YES) {
        release(moves, s, slot);
        abandon(moves, s, slot);
    }
}

static void go_on(Moves *moves, const State *s, int slot) {
    Word word = s->word[slot];
    int g = group_index(word), e = endpoint_index(word), x = GROUPS + e, tried = s->thread[slot].tried;
    abandon(moves, s, slot);
    switch (s->thread[slot].place) {
    case CLAIM_TAKE_GROUP: take(moves, s, slot, g, CLAIM_GOT_GROUP, CLAIM_GROUP_BUSY, 0); break;
    case CLAIM_GOT_GROUP:
        claim_endpoint(moves, s, slot, 0);
        post(moves, s, slot, g, STORE_FREE); /* it was one that is left to others */
        break;
    case CLAIM_GROUP_BUSY: step(moves, s, slot, FREE, AT_REST, 0, "claim waits"); break;
    case CLAIM_TAKE_ENDPOINT:
        take(moves, s, slot, x, CLAIM_GOT_ENDPOINT, CLAIM_ENDPOINT_BUSY, tried | 1 << e);
        break;
    case CLAIM_GOT_ENDPOINT: step(moves, s, slot, word_of(g, YES, e, YES), AT_REST, 0, "claim done"); break;
    case CLAIM_ENDPOINT_BUSY: claim_endpoint(moves, s, slot, tried); break;
    case GIVE_UP_POST: post(moves, s, slot, g, STORE_FREE); break;
    case RELEASE_POST_ENDPOINT: post(moves, s, slot, x, RELEASE_POST_GROUP); break;
    case RELEASE_POST_GROUP: post(moves, s, slot, g, STORE_FREE); break;
    case STORE_FREE: step(moves, s, slot, FREE, AT_REST, 0, "done"); break;
    }
}

/* ---- rows: shmpool/rows.py ------------------------------------------------------------------------------------ */

static bool is_dirty(const State *s, int row) {
    for (int slot = row * SLOTS; slot < (row + 1) * SLOTS; slot++)
        if (!is_free(s->word[slot]) && !is_orphan(s->word[slot])) return true;
    return false;
}

static void kill_worker(Moves *moves, const State *s, int row) {
    State t = *s;
    t.row[row] = DEAD;
    memset(&t.thread[row * SLOTS], 0, SLOTS * sizeof(Thread));
    move(moves, &t, "*** worker %d is killed", row);
}

/* take_row: lock, then look; the slot words are not touched. */
static void take_row(Moves *moves, const State *s, int row) {
    State t = *s;
    if (s->row[row] == DEAD) {
        t.row[row] = TAKING;
        move(moves, &t, "a newcomer locks row %d", row);
        return;
    }
    bool is_taken = !is_dirty(s, row) || mistake == TAKE_DIRTY_ROW;
    t.row[row] = is_taken ? ALIVE : DEAD;
    move(moves, &t, "the newcomer %s row %d", is_taken ? "takes" : "unlocks", row);
}

static void worker_moves(Moves *moves, const State *s, int row) {
    if (s->row[row] == REAPING) return;
    if (s->row[row] != ALIVE) take_row(moves, s, row);
    if (s->row[row] == DEAD) return;
    kill_worker(moves, s, row);
    if (s->row[row] != ALIVE) return;
    for (int slot = row * SLOTS; slot < (row + 1) * SLOTS; slot++) {
        if (s->thread[slot].place == AT_REST) begin_bracket(moves, s, slot);
        else go_on(moves, s, slot);
    }
}

/* ---- the coordinator: permits.py, reaper.py ------------------------------------------------------------------- */

static void be_idle(State *s) { memset(&s->coordinator, 0, sizeof s->coordinator); }

/* Reaper._reap: with the row's lock, set ORPHAN in each word that is neither FREE nor an orphan's. */
static bool may_reap(const State *s, int row) {
    return (s->row[row] == DEAD || (mistake == REAP_THE_LIVING && s->row[row] == ALIVE)) && is_dirty(s, row);
}

static void begin_reap(State *s, int row) {
    if (s->row[row] == DEAD) s->row[row] = REAPING;
    s->coordinator.task = REAP;
    s->coordinator.at = row;
}

static void unlock_row(State *s) {
    if (s->coordinator.task == REAP && s->row[s->coordinator.at] == REAPING) s->row[s->coordinator.at] = DEAD;
}

static void reap(Moves *moves, const State *s) {
    State t = *s;
    int row = s->coordinator.at;
    for (int slot = row * SLOTS; slot < (row + 1) * SLOTS; slot++) {
        if (is_free(s->word[slot]) || is_orphan(s->word[slot])) continue;
        store(&t, slot, s->word[slot] | ORPHAN);
        move(moves, &t, "coordinator: reap row %d: slot %d := %s", row, slot, text(t.word[slot]));
        return;
    }
    unlock_row(&t);
    be_idle(&t);
    move(moves, &t, "coordinator: row %d is reaped", row);
}

/* Permits.settle: record, give, mark. */
static bool may_settle(const State *s, int slot, int x) {
    Word word = s->word[slot];
    if (mistake == GROUP_WAITS_FOR_ENDPOINT && is_group(x) && endpoint_field(word) == MAYBE) return false;
    return is_orphan(word) && certain(word, x);
}

static void begin_settle(State *s, int slot, int x) {
    if (mistake == SETTLE_WITHOUT_RECORD) s->permits[x].value++;
    else store(s, slot, with_field(s->word[slot], x, MAYBE));
    s->coordinator.task = mistake == SETTLE_WITHOUT_RECORD ? SETTLE_MARK : SETTLE_GIVE;
    s->coordinator.at = slot;
    s->coordinator.x = x;
}

/* Permits.give */
static void settle_give(Moves *moves, const State *s) {
    int x = s->coordinator.x;
    State t = *s;
    t.coordinator.task = SETTLE_MARK;
    if (surplus(&t.permits[x])) {
        t.permits[x].issued--;
        move(moves, &t, "coordinator: settle slot %d: take %s off the surplus", s->coordinator.at, name(x));
        t.permits[x].issued++;
    }
    t.permits[x].value++;
    move(moves, &t, "coordinator: settle slot %d: post %s", s->coordinator.at, name(x));
}

static void settle_mark(Moves *moves, const State *s) {
    State t = *s;
    int slot = s->coordinator.at;
    store(&t, slot, with_field(s->word[slot], s->coordinator.x, NONE));
    be_idle(&t);
    move(moves, &t, "coordinator: settle slot %d: store %s", slot, text(t.word[slot]));
}

/* Permits.audit: copy, read the value, compare, conclude; then absorb, post, mark. */

static bool is_member(const State *s, int slot) {
    if (mistake == REREAD_TABLE) return is_orphan(s->word[slot]);
    return s->coordinator.members >> slot & 1;
}

static bool may_audit(const State *s, int x) {
    if (AUDIT_ALWAYS || s->permits[x].pending) return true;
    for (int slot = 0; slot < ALL_SLOTS; slot++)
        if (is_orphan(s->word[slot]) && unknown(s->word[slot], x)) return true;
    return false;
}

/* The next of absorb, post, mark; the order is what makes a coordinator killed in between harmless. */
static void choose_next(State *s) {
    Coordinator *c = &s->coordinator;
    if (c->absorb && mistake != ABSORB_LAST) c->task = AUDIT_ABSORB;
    else if (c->post && !(mistake == MARK_BEFORE_POST && c->mark)) c->task = AUDIT_POST;
    else if (c->mark) c->task = AUDIT_MARK;
    else if (c->absorb) c->task = AUDIT_ABSORB;
    else be_idle(s);
}

/* Permits._audit_one: what a clean copy tells. */
static void conclude(State *s) {
    Coordinator audit = s->coordinator;
    const Permits *p = &s->permits[audit.x];
    int held = audit.certain, orphans = 0, live = mistake == IGNORE_LIVE ? 0 : audit.live;
    for (int slot = 0; slot < ALL_SLOTS; slot++) {
        if (audit.members >> slot & 1) held += certain(s->word[slot], audit.x);
        if (is_member(s, slot)) orphans += unknown(s->word[slot], audit.x);
    }
    int uncertain = orphans + p->pending, missing = p->issued - audit.value - held;
    be_idle(s);
    if (missing < 0 || missing > uncertain + live) {
        s->coordinator.task = AUDIT_IMPOSSIBLE;
        s->coordinator.x = audit.x;
        return;
    }
    if (mistake == WAIT_FOR_LIVE && live) return;
    int low = missing > live ? missing - live : 0, high = missing < uncertain ? missing : uncertain;
    int absorb = low < surplus(p) ? low : surplus(p);
    s->coordinator.x = audit.x;
    s->coordinator.members = audit.members;
    s->coordinator.absorb = absorb;
    s->coordinator.post = low - absorb;
    s->coordinator.mark = uncertain - (high - low);
    choose_next(s);
}

static void compare_orphans(State *s) {
    Coordinator *c = &s->coordinator;
    while (c->at < ALL_SLOTS && c->members >> c->at & 1) c->at++;
    if (c->at < ALL_SLOTS) return;
    if (mistake == VALUE_AFTER_COPIES) c->task = AUDIT_VALUE;
    else conclude(s);
}

/* Orphans cost no move of their own: nobody writes them while the coordinator is busy here. */
static void copy_orphans(State *s) {
    Coordinator *c = &s->coordinator;
    for (; c->at < ALL_SLOTS && is_orphan(s->word[c->at]); c->at++) c->members |= 1 << c->at;
    if (c->at < ALL_SLOTS) return;
    c->at = 0;
    c->task = AUDIT_VALUE;
    if (mistake != VALUE_AFTER_COPIES) return;
    c->task = AUDIT_COMPARE;
    compare_orphans(s);
}

static void begin_audit(State *s, int x) {
    s->coordinator.task = AUDIT_COPY;
    s->coordinator.x = x;
    copy_orphans(s);
}

static void audit_copy(Moves *moves, const State *s) {
    State t = *s;
    int slot = t.coordinator.at++;
#if MISTAKE == NO_SEQUENCE || MISTAKE == COMPARE_MENTIONS
    t.coordinator.copy[slot] = s->word[slot];
#endif
    if (is_orphan(s->word[slot])) t.coordinator.members |= 1 << slot;
    copy_orphans(&t);
    move(moves, &t, "coordinator: audit %s: copy slot %d: %s", name(s->coordinator.x), slot, text(s->word[slot]));
}

static void audit_value(Moves *moves, const State *s) {
    State t = *s;
    int x = s->coordinator.x, value = s->permits[x].value;
    t.coordinator.value = value;
    t.coordinator.task = AUDIT_COMPARE;
    if (mistake == VALUE_AFTER_COPIES) conclude(&t);
    else compare_orphans(&t);
    move(moves, &t, "coordinator: audit %s: its value is %d", name(x), value);
}

static bool has_changed(const State *s, int slot) {
    const Coordinator *c = &s->coordinator;
    if (is_orphan(s->word[slot])) return true; /* abandoned meanwhile */
#if MISTAKE == NO_SEQUENCE
    return c->copy[slot] != s->word[slot];
#elif MISTAKE == COMPARE_MENTIONS
    if (!field(c->copy[slot], c->x) && !field(s->word[slot], c->x)) return false;
#endif
    return c->changed >> slot & 1;
}

static void audit_compare(Moves *moves, const State *s) {
    State t = *s;
    int slot = s->coordinator.at, x = s->coordinator.x;
    if (has_changed(s, slot)) {
        be_idle(&t);
        move(moves, &t, "coordinator: audit %s: slot %d has changed: not now", name(x), slot);
        return;
    }
    t.coordinator.certain += certain(s->word[slot], x);
    t.coordinator.live += unknown(s->word[slot], x);
    t.coordinator.at++;
    compare_orphans(&t);
    move(moves, &t, "coordinator: audit %s: slot %d is unchanged: %s", name(x), slot, text(s->word[slot]));
}

static void audit_absorb(Moves *moves, const State *s) {
    State t = *s;
    int x = s->coordinator.x;
    t.permits[x].issued -= s->coordinator.absorb;
    t.coordinator.absorb = 0;
    choose_next(&t);
    move(moves, &t, "coordinator: audit %s: take %d off the surplus", name(x), s->coordinator.absorb);
}

static void audit_post(Moves *moves, const State *s) {
    State t = *s;
    int x = s->coordinator.x;
    t.permits[x].value++;
    t.coordinator.post--;
    choose_next(&t);
    move(moves, &t, "coordinator: audit %s: post a lost permit", name(x));
}

/* Any member first; the permits of a resize when no member is left. */
static void audit_mark(Moves *moves, const State *s) {
    int x = s->coordinator.x, before = moves->count;
    for (int slot = 0; slot < ALL_SLOTS; slot++) {
        if (!is_member(s, slot) || !is_orphan(s->word[slot]) || !unknown(s->word[slot], x)) continue;
        State t = *s;
        store(&t, slot, mistake == MARK_BOTH_FIELDS ? FREE : with_field(s->word[slot], x, NONE));
        t.coordinator.mark--;
        choose_next(&t);
        move(moves, &t, "coordinator: audit %s: mark slot %d: %s", name(x), slot, text(t.word[slot]));
    }
    if (moves->count > before) return;
    State t = *s;
    t.permits[x].pending -= s->coordinator.mark;
    t.coordinator.mark = 0;
    choose_next(&t);
    move(moves, &t, "coordinator: audit %s: pending := %d", name(x), t.permits[x].pending);
}

/* Permits.grow: record, post each, forget the record. */
static bool may_grow(const State *s, int x) {
    return s->permits[x].issued < s->permits[x].target && !s->permits[x].pending;
}

static void begin_grow(State *s, int x) {
    Permits *p = &s->permits[x];
    s->coordinator.task = GROW_POST;
    s->coordinator.x = x;
    s->coordinator.post = p->target - p->issued;
    if (mistake != GROW_WITHOUT_PENDING) p->pending = p->target - p->issued;
    p->issued = p->target;
}

static void grow_post(Moves *moves, const State *s) {
    State t = *s;
    t.permits[s->coordinator.x].value++;
    if (--t.coordinator.post == 0) t.coordinator.task = GROW_DONE;
    move(moves, &t, "coordinator: grow: post %s", name(s->coordinator.x));
}

/* Permits.shrink: record, take, store what came of it. */
static bool may_shrink(const State *s, int x) { return surplus(&s->permits[x]) && !s->permits[x].pending; }

static void begin_shrink(State *s, int x) {
    s->coordinator.task = SHRINK_TAKE;
    s->coordinator.x = x;
    if (mistake != SHRINK_WITHOUT_PENDING) s->permits[x].pending = 1;
}

static void shrink_take(Moves *moves, const State *s) {
    State t = *s;
    Permits *p = &t.permits[s->coordinator.x];
    bool is_there = p->value > 0;
    if (is_there) p->value--;
    t.coordinator.task = is_there ? SHRINK_TOOK : SHRINK_BUSY;
    move(moves, &t, "coordinator: shrink: take %s: %s", name(s->coordinator.x), is_there ? "got it" : "busy");
}

/* The last store of grow and shrink. */
static void end_resize(Moves *moves, const State *s, int less) {
    State t = *s;
    Permits *p = &t.permits[s->coordinator.x];
    p->issued -= less;
    p->pending = 0;
    be_idle(&t);
    move(moves, &t, "coordinator: %s: issued %d, pending 0", name(s->coordinator.x), p->issued);
}

static void resize_moves(Moves *moves, const State *s, int x) {
    int one = is_group(x) ? GROUP_CAP : ENDPOINT_CAP, other = is_group(x) ? GROUP_CAP2 : ENDPOINT_CAP2;
    if (one == other) return;
    State t = *s;
    t.permits[x].target = s->permits[x].target == one ? other : one;
    move(moves, &t, "coordinator: the target of %s := %d", name(x), t.permits[x].target);
    t = *s;
    if (may_grow(s, x)) {
        begin_grow(&t, x);
        move(moves, &t, "coordinator: grow %s: issued %d, pending %d", name(x), t.permits[x].issued,
             t.permits[x].pending);
    } else if (may_shrink(s, x)) {
        begin_shrink(&t, x);
        move(moves, &t, "coordinator: shrink %s: pending %d", name(x), t.permits[x].pending);
    }
}

/* Whatever a tick may begin with: the model takes every order. */
static void begin_task(Moves *moves, const State *s) {
    State t;
    for (int row = 0; row < WORKERS; row++) {
        if (!may_reap(s, row)) continue;
        t = *s;
        begin_reap(&t, row);
        move(moves, &t, "coordinator: lock row %d to reap it", row);
    }
    for (int slot = 0; slot < ALL_SLOTS; slot++) {
        for (int x = 0; x < SEMAPHORES; x++) {
            if (!may_settle(s, slot, x)) continue;
            t = *s;
            begin_settle(&t, slot, x);
            move(moves, &t, "coordinator: settle slot %d: %s", slot, text(t.word[slot]));
        }
    }
    for (int x = 0; x < SEMAPHORES; x++) {
        if (may_audit(s, x)) {
            t = *s;
            begin_audit(&t, x);
            move(moves, &t, "coordinator: audit %s: begin", name(x));
        }
        resize_moves(moves, s, x);
    }
}

static void go_on_with_task(Moves *moves, const State *s) {
    switch (s->coordinator.task) {
    case REAP: reap(moves, s); break;
    case SETTLE_GIVE: settle_give(moves, s); break;
    case SETTLE_MARK: settle_mark(moves, s); break;
    case AUDIT_COPY: audit_copy(moves, s); break;
    case AUDIT_VALUE: audit_value(moves, s); break;
    case AUDIT_COMPARE: audit_compare(moves, s); break;
    case AUDIT_ABSORB: audit_absorb(moves, s); break;
    case AUDIT_POST: audit_post(moves, s); break;
    case AUDIT_MARK: audit_mark(moves, s); break;
    case GROW_POST: grow_post(moves, s); break;
    case GROW_DONE: end_resize(moves, s, 0); break;
    case SHRINK_TAKE: shrink_take(moves, s); break;
    case SHRINK_TOOK: end_resize(moves, s, 1); break;
    case SHRINK_BUSY: end_resize(moves, s, 0); break;
    }
}

static void coordinator_moves(Moves *moves, const State *s) {
    if (s->coordinator.task == IDLE) {
        begin_task(moves, s);
        return;
    }
    go_on_with_task(moves, s);
    State t = *s;
    unlock_row(&t);
    be_idle(&t);
    move(moves, &t, "*** the coordinator is killed; a new one adopts");
}

static void all_moves(Moves *moves, const State *s) {
    moves->count = 0;
    for (int row = 0; row < WORKERS; row++) worker_moves(moves, s, row);
    coordinator_moves(moves, s);
}

/* ---- what must hold: shmpool/invariants.py -------------------------------------------------------------------- */

static char violation[200];

__attribute__((format(printf, 1, 2))) static bool broken(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(violation, sizeof violation, format, arguments);
    va_end(arguments);
    return false;
}

/* Whether a thread in its bracket has a permit of x that its word calls MAYBE. */
static bool has_in_hand(int place, int x) {
    switch (place) {
    case CLAIM_GOT_GROUP:
    case GIVE_UP_POST:
    case RELEASE_POST_GROUP: return is_group(x);
    case CLAIM_GOT_ENDPOINT: return !is_group(x);
    case RELEASE_POST_ENDPOINT: return true;
    default: return false;
    }
}

/* No permit invented, none lost without a record.  Sharper than a snapshot can be: live brackets are looked into. */
static bool permits_add_up(const State *s, int x) {
    const Permits *p = &s->permits[x];
    int held = 0, in_hand = 0, on_record = p->pending;
    for (int slot = 0; slot < ALL_SLOTS; slot++) {
        held += certain(s->word[slot], x);
        if (!unknown(s->word[slot], x)) continue;
        if (s->thread[slot].place == AT_REST) on_record++;
        else in_hand += has_in_hand(s->thread[slot].place, x);
    }
    int lost = p->issued - p->value - held - in_hand;
    if (lost < 0)
        return broken("%s: permit invented: issued %d < value %d + held %d + in hand %d", name(x), p->issued, p->value,
                      held, in_hand);
    if (lost > on_record)
        return broken("%s: permit lost: issued %d, value %d, held %d, in hand %d, but %d on record", name(x), p->issued,
                      p->value, held, in_hand, on_record);
    int one = is_group(x) ? GROUP_CAP : ENDPOINT_CAP, other = is_group(x) ? GROUP_CAP2 : ENDPOINT_CAP2;
    int most = one > other ? one : other;
    if (p->issued > most) return broken("%s: issued %d is beyond every target", name(x), p->issued);
    return true;
}

/* A word is what its writer stored last. */
static bool has_one_writer(const State *s, int slot) {
    Word word = s->word[slot];
    int g = group_field(word), e = endpoint_field(word);
    bool is_right = !is_orphan(word);
    switch (s->thread[slot].place) {
    case AT_REST:
        is_right = is_orphan(word) || s->row[slot / SLOTS] != ALIVE || is_free(word) || (g == YES && e != MAYBE);
        break;
    case CLAIM_TAKE_GROUP:
    case CLAIM_GOT_GROUP:
    case CLAIM_GROUP_BUSY:
    case GIVE_UP_POST: is_right &= g == MAYBE && e == NONE; break;
    case CLAIM_TAKE_ENDPOINT:
    case CLAIM_GOT_ENDPOINT:
    case CLAIM_ENDPOINT_BUSY: is_right &= g == YES && e == MAYBE; break;
    case RELEASE_POST_ENDPOINT:
    case RELEASE_POST_GROUP: is_right &= g == MAYBE && e == MAYBE; break;
    case STORE_FREE: is_right &= g == MAYBE && e != YES; break;
    }
    if (is_right) return true;
    return broken("slot %d: two writers: its thread is at \"%s\", its word is %s", slot,
                  PLACES[s->thread[slot].place], text(word));
}

static bool is_well_formed(const State *s, int slot) {
    Word word = s->word[slot];
    int g = group_field(word), e = endpoint_field(word);
    bool is_right = g <= YES && e <= YES && (g || !group_index(word)) && (e || !endpoint_index(word)) &&
                    !(is_orphan(word) && is_free(word));
    return is_right || broken("slot %d: the word %s is malformed", slot, text(word));
}

static bool holds(const State *s) {
    if (s->coordinator.task == AUDIT_IMPOSSIBLE)
        return broken("%s: the audit's count is out of bounds", name(s->coordinator.x));
    for (int x = 0; x < SEMAPHORES; x++)
        if (!permits_add_up(s, x)) return false;
    for (int slot = 0; slot < ALL_SLOTS; slot++)
        if (!has_one_writer(s, slot) || !is_well_formed(s, slot)) return false;
    return true;
}

/* ---- the coordinator alone brings everything back ------------------------------------------------------------- */

static void finish_task(State *s) {
    static Moves moves;
    while (s->coordinator.task != IDLE && s->coordinator.task != AUDIT_IMPOSSIBLE) {
        moves.count = 0;
        go_on_with_task(&moves, s);
        *s = moves.next[0];
    }
}

static void tick(State *s, bool are_sessions_gone) {
    for (int row = 0; row < WORKERS; row++)
        if (may_reap(s, row)) begin_reap(s, row), finish_task(s);
    for (int slot = 0; slot < ALL_SLOTS; slot++)
        for (int x = 0; x < SEMAPHORES; x++)
            if (may_settle(s, slot, x) && (is_group(x) || are_sessions_gone)) begin_settle(s, slot, x), finish_task(s);
    for (int x = 0; x < SEMAPHORES; x++) {
        begin_audit(s, x), finish_task(s);
        if (s->coordinator.task == AUDIT_IMPOSSIBLE) return;
    }
    for (int x = 0; x < SEMAPHORES; x++)
        if (may_grow(s, x)) begin_grow(s, x), finish_task(s);
        else if (may_shrink(s, x)) begin_shrink(s, x), finish_task(s);
}

/* Of each semaphore, at most as much stays open as stopped workers leave in doubt. */
static bool is_settled(const State *s, int x, bool are_sessions_gone) {
    const Permits *p = &s->permits[x];
    int open = p->pending, live = 0, held = 0;
    for (int slot = 0; slot < ALL_SLOTS; slot++) {
        Word word = s->word[slot];
        held += certain(word, x);
        if (unknown(word, x)) *(is_orphan(word) ? &open : &live) += 1;
        if (is_orphan(word) && certain(word, x) && (is_group(x) || are_sessions_gone))
            return broken("the coordinator alone does not settle %s of slot %d: %s", name(x), slot, text(word));
    }
    if (open > live)
        return broken("the coordinator alone leaves %d of %s open, with %d in doubt by the living", open, name(x),
                      live);
    if (!live && p->issued != p->value + held)
        return broken("the coordinator alone ends with %s: issued %d, value %d, held %d", name(x), p->issued, p->value,
                      held);
    return true;
}

/* Stop every worker where it is, and let the coordinator tick until nothing changes. */
static bool settles_alone(const State *from, bool are_sessions_gone) {
    enum { TICKS = 40 };
    State s = *from, before;
    int ticks = 0;
    for (int row = 0; row < WORKERS; row++)
        if (s.row[row] == TAKING) s.row[row] = DEAD;
    do {
        if (++ticks > TICKS) return broken("the coordinator alone comes to no end in %d ticks", TICKS);
        before = s;
        tick(&s, are_sessions_gone);
        if (s.coordinator.task == AUDIT_IMPOSSIBLE) return holds(&s);
    } while (memcmp(&before, &s, sizeof s));
    for (int x = 0; x < SEMAPHORES; x++)
        if (!is_settled(&s, x, are_sessions_gone)) return false;
    return true;
}

/* ---- the search ----------------------------------------------------------------------------------------------- */

static struct {
    State *states;
    uint32_t *parents; /* the first state has itself */
    uint32_t *table;   /* open addressing; number + 1, 0 is empty */
    uint32_t count, room, table_mask;
} seen;

static uint32_t hash(const State *s) {
    uint64_t h = 0x9e3779b97f4a7c15u, part;
    const char *bytes = (const char *)s;
    for (size_t at = 0; at < sizeof *s; at += sizeof part) {
        size_t left = sizeof *s - at;
        part = 0;
        memcpy(&part, bytes + at, left < sizeof part ? left : sizeof part);
        h = (h ^ part) * 0xff51afd7ed558ccdu;
        h ^= h >> 32;
    }
    return (uint32_t)h;
}

static uint32_t *place_in_table(const State *s) {
    for (uint32_t at = hash(s);; at++) {
        uint32_t *entry = &seen.table[at & seen.table_mask];
        if (!*entry || !memcmp(&seen.states[*entry - 1], s, sizeof *s)) return entry;
    }
}

static void *or_die(void *memory) {
    if (memory) return memory;
    fprintf(stderr, "permit: out of memory at %u states\n", seen.count);
    exit(2);
}

static void make_room(void) {
    seen.room = seen.room ? seen.room * 2 : 1 << 16;
    seen.states = or_die(realloc(seen.states, (size_t)seen.room * sizeof(State)));
    seen.parents = or_die(realloc(seen.parents, (size_t)seen.room * sizeof(uint32_t)));
    free(seen.table);
    seen.table = or_die(calloc((size_t)seen.room * 2, sizeof(uint32_t)));
    seen.table_mask = seen.room * 2 - 1;
    for (uint32_t i = 0; i < seen.count; i++) *place_in_table(&seen.states[i]) = i + 1;
}

/* Returns whether the state is new. */
static bool remember(const State *s, uint32_t parent) {
    if (seen.count == seen.room) make_room();
    uint32_t *entry = place_in_table(s);
    if (*entry) return false;
    seen.states[seen.count] = *s;
    seen.parents[seen.count] = parent;
    *entry = ++seen.count;
    return true;
}

static void print_state(const State *s) {
    for (int slot = 0; slot < ALL_SLOTS; slot++)
        printf("      slot %d: %s, thread at \"%s\"\n", slot, text(s->word[slot]), PLACES[s->thread[slot].place]);
    for (int x = 0; x < SEMAPHORES; x++)
        printf("      %s: value %d, issued %d, pending %d, target %d\n", name(x), s->permits[x].value,
               s->permits[x].issued, s->permits[x].pending, s->permits[x].target);
}

/* Prints the moves from the first state to this one; returns how many. */
static int print_trace(uint32_t number) {
    static Moves moves;
    uint32_t parent = seen.parents[number];
    if (parent == number) return 0;
    int steps = print_trace(parent) + 1;
    moves.is_told = true;
    all_moves(&moves, &seen.states[parent]);
    int i = 0;
    while (memcmp(&moves.next[i], &seen.states[number], sizeof(State))) i++;
    printf("%4d. %s\n", steps, moves.label[i]);
    return steps;
}

static int report_violation(void) {
    char what[sizeof violation]; /* telling the trace must not overwrite it */
    memcpy(what, violation, sizeof what);
    int steps = print_trace(seen.count - 1);
    print_state(&seen.states[seen.count - 1]);
    printf("violation: %s\nstates %u steps %d\n", what, seen.count, steps);
    return 1;
}

int main(void) {
    static Moves moves;
    State first;
    memset(&first, 0, sizeof first);
    for (int x = 0; x < SEMAPHORES; x++) {
        int cap = is_group(x) ? GROUP_CAP : ENDPOINT_CAP;
        first.permits[x] = (Permits){.value = cap, .issued = cap, .target = cap};
    }
    remember(&first, 0);
    uint64_t edges = 0;
    uint32_t depth = 0, end_of_depth = 1;
    for (uint32_t i = 0; i < seen.count; i++) {
        if (i == end_of_depth) depth++, end_of_depth = seen.count;
        all_moves(&moves, &seen.states[i]);
        edges += moves.count;
        for (int j = 0; j < moves.count; j++) {
            const State *next = &moves.next[j];
            if (!remember(next, i)) continue;
            if (!holds(next)) return report_violation();
            if (next->coordinator.task == IDLE && !(settles_alone(next, true) && settles_alone(next, false)))
                return report_violation();
            if (seen.count >= MAX_STATES) {
                printf("more than %u states, no violation so far\nstates %u depth %u\n", MAX_STATES, seen.count, depth);
                return 2;
            }
        }
    }
    printf("ok\nstates %u edges %llu depth %u bytes %zu\n", seen.count, (unsigned long long)edges, depth,
           sizeof(State));
    return 0;
}
