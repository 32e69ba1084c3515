package certs

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"kraken/proto/role"
	"kraken/proto/transport"
)

const day = 24 * time.Hour

func authority(t *testing.T) *Authority {
	t.Helper()
	a, err := Init(filepath.Join(t.TempDir(), "certs"), "prod", AuthorityLife)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func issue(t *testing.T, a *Authority, r Request) Issued {
	t.Helper()
	i, err := a.Issue(r)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// What is issued is believed by who trusts ca.pem, says who its holder is, and has a key for its owner's eyes alone.
func TestIssue(t *testing.T) {
	a := authority(t)
	for _, r := range []Request{
		{Role: transport.RoleOrigin, ID: "origin-01", Hosts: []string{"origin-01.example", "10.0.0.7", "fd00::7"}, Life: 90 * day},
		{Role: transport.RoleAgent, ID: "node_17.rack-3", Life: day},
		{Role: transport.RoleOperator, ID: "alice", Life: day},
	} {
		i := issue(t, a, r)
		pair, err := tls.LoadX509KeyPair(i.File, i.KeyFile)
		if err != nil {
			t.Fatal(err)
		}
		if p, err := transport.PrincipalOf(pair.Leaf); err != nil || p != (transport.Principal{Cluster: "prod", Role: r.Role, ID: r.ID}) {
			t.Errorf("%s: identity %v, %v", r.ID, p, err)
		}
		for _, file := range []string{i.KeyFile, filepath.Join(a.Dir, keyFile)} {
			if fi, err := os.Stat(file); err != nil || fi.Mode().Perm() != 0o600 {
				t.Errorf("%s: %v, %v", file, fi.Mode(), err)
			}
		}
		want := Want{CA: filepath.Join(a.Dir, AuthorityFile), Cluster: "prod", Role: r.Role}
		if len(r.Hosts) > 0 {
			want.Host = r.Hosts[len(r.Hosts)-1]
		}
		if faults, says, err := Check(i.File, want, time.Now()); err != nil || len(faults) > 0 {
			t.Errorf("%s: %s: %q, %v", i.File, says, faults, err)
		}
	}
}

func TestWhatCannotBeIssued(t *testing.T) {
	a := authority(t)
	for name, r := range map[string]Request{
		"no role":           {ID: "x"},
		"unknown role":      {Role: "warden", ID: "x"},
		"no id":             {Role: transport.RoleAgent},
		"an id that climbs": {Role: transport.RoleAgent, ID: "../../x"},
		"an id with slash":  {Role: transport.RoleAgent, ID: "a/b"},
		"no host":           {Role: transport.RoleTracker, ID: "tracker-01"},
		"host with port":    {Role: transport.RoleOrigin, ID: "o", Hosts: []string{"origin:16031"}},
		"host that is all":  {Role: transport.RoleOrigin, ID: "o", Hosts: []string{"*.example"}},
	} {
		r.Life = day
		if i, err := a.Issue(r); err == nil {
			t.Errorf("%s: issued %s", name, i.File)
		}
	}
	for _, cluster := range []string{"", "Prod", "a/b", "-a", strings.Repeat("a", 64)} {
		if _, err := Init(t.TempDir(), cluster, day); err == nil {
			t.Errorf("cluster %q was made", cluster)
		}
	}
	if _, err := Init(a.Dir, "prod", day); err == nil {
		t.Error("a second authority took the place of the first")
	}
}

// Renewal takes what ends soon, has the same names and times, and other keys.
func TestRenew(t *testing.T) {
	a := authority(t)
	early := issue(t, a, Request{Role: transport.RoleProxy, ID: "early", Hosts: []string{"proxy.example"}, Life: 90 * day})
	late := issue(t, a, Request{Role: transport.RoleAgent, ID: "late", Hosts: []string{"10.0.0.9"}, Life: 2 * day})
	if renewed, err := a.Renew(0, false); err != nil || len(renewed) != 0 {
		t.Errorf("a new one was renewed: %v, %v", renewed, err)
	}
	renewed, err := a.Renew(3*day, false)
	if err != nil || len(renewed) != 1 || renewed[0].File != late.File {
		t.Fatalf("renewed %v, %v", renewed, err)
	}
	before, after := late.Cert, renewed[0].Cert
	if before.URIs[0].String() != after.URIs[0].String() || !before.IPAddresses[0].Equal(after.IPAddresses[0]) ||
		(after.NotAfter.Sub(after.NotBefore)-before.NotAfter.Sub(before.NotBefore)).Abs() > time.Second {
		t.Errorf("before %v, after %v", before, after)
	}
	if bytes.Equal(before.RawSubjectPublicKeyInfo, after.RawSubjectPublicKeyInfo) || before.SerialNumber.Cmp(after.SerialNumber) == 0 {
		t.Error("the key or the serial number is that of before")
	}
	if renewed, err := a.Renew(0, true); err != nil || len(renewed) != 2 {
		t.Errorf("all: %v, %v", renewed, err)
	}
	if _, err := tls.LoadX509KeyPair(early.File, early.KeyFile); err != nil {
		t.Error(err)
	}
}

// At each step what nodes hold that have the files of the step before is trusted by those that have the new ones.
func TestAuthorityFollowsAuthority(t *testing.T) {
	a := authority(t)
	r := Request{Role: transport.RoleAgent, ID: "node", Life: day}
	var held []*x509.Certificate
	var trusted []*x509.CertPool
	step := func(do func() error) {
		t.Helper()
		if err := do(); err != nil {
			t.Fatal(err)
		}
		var err error
		if a, err = Open(a.Dir); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(filepath.Join(a.Dir, AuthorityFile))
		if err != nil {
			t.Fatal(err)
		}
		pool := x509.NewCertPool()
		pool.AppendCertsFromPEM(b)
		certs, err := readCertificates(a.files(transport.Principal{Cluster: "prod", Role: r.Role, ID: r.ID}).File)
		if err != nil {
			t.Fatal(err)
		}
		held, trusted = append(held, certs[0]), append(trusted, pool)
		for _, c := range held[max(0, len(held)-2):] {
			for _, p := range trusted[max(0, len(trusted)-2):] {
				if _, err := c.Verify(x509.VerifyOptions{Roots: p, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
					t.Errorf("step %d: %v", len(held), err)
				}
			}
		}
	}
	if err := a.Switch(); err == nil {
		t.Error("switched to no authority")
	}
	step(func() error { _, err := a.Issue(r); return err })
	step(func() error { return a.Next(AuthorityLife) })
	if a.Drop() == nil {
		t.Error("the next authority was dropped")
	}
	step(a.Switch)
	if a.Drop() == nil {
		t.Error("an authority was dropped whose certificates are in use")
	}
	step(func() error { _, err := a.Renew(0, true); return err })
	step(a.Drop)
	if _, err := held[0].Verify(x509.VerifyOptions{Roots: trusted[len(trusted)-1]}); err == nil {
		t.Error("the old authority is trusted still")
	}
}

func TestCheckSaysWhatIsWrong(t *testing.T) {
	a, other := authority(t), authority(t)
	ca := filepath.Join(a.Dir, AuthorityFile)
	i := issue(t, a, Request{Role: transport.RoleOrigin, ID: "o1", Hosts: []string{"o1.example"}, Life: 30 * day})
	stranger := issue(t, other, Request{Role: transport.RoleOperator, ID: "mallory", Life: 30 * day})
	open := issue(t, a, Request{Role: transport.RoleAgent, ID: "open", Life: 30 * day})
	if err := os.Chmod(open.KeyFile, 0o644); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		file string
		want Want
		at   time.Duration
		says string // among the faults; empty: there are none
	}{
		"all well":       {file: i.File, want: Want{CA: ca, Cluster: "prod", Role: transport.RoleOrigin, Host: "o1.example", Within: 14 * day}},
		"expired":        {file: i.File, want: Want{CA: ca}, at: 31 * day, says: "has expired"},
		"soon":           {file: i.File, want: Want{CA: ca, Within: 14 * day}, at: 20 * day, says: "expires in"},
		"not yet":        {file: i.File, want: Want{CA: ca}, at: -day, says: "is not valid for another"},
		"other CA":       {file: stranger.File, want: Want{CA: ca}, says: "no authority in"},
		"other cluster":  {file: i.File, want: Want{Cluster: "test"}, says: "of the cluster prod, not test"},
		"other role":     {file: i.File, want: Want{Role: transport.RoleAgent}, says: "names the role origin, not agent"},
		"other host":     {file: i.File, want: Want{Host: "o2.example"}, says: "clients that call it o2.example refuse it"},
		"other key":      {file: i.File, want: Want{Key: stranger.KeyFile}, says: "is not its own"},
		"no key":         {file: i.File, want: Want{Key: "/nowhere.key"}, says: "can't be looked at"},
		"key of all":     {file: open.File, says: "chmod 600"},
		"authority":      {file: ca},
		"authority ends": {file: ca, at: 11 * 365 * day, says: "has expired"},
	} {
		faults, says, err := Check(c.file, c.want, time.Now().Add(c.at))
		text := strings.Join(faults, "\n")
		if err != nil || (len(faults) > 0) != (c.says != "") || !strings.Contains(text, c.says) {
			t.Errorf("%s: %s: %q, %v", name, says, text, err)
		}
	}
	if _, _, err := Check(i.KeyFile, Want{}, time.Now()); err == nil {
		t.Error("a key passes for a certificate")
	}
}

// The commands as people type them.
func TestCommand(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "certs")
	run := func(args ...string) (code int, out, errs string) {
		var o, e bytes.Buffer
		code = role.Execute(t.Context(), Command(), append(args, "--dir", dir), &o, &e)
		return code, o.String(), e.String()
	}
	for _, c := range []struct {
		args string
		code int
		says string
	}{
		{"issue --role agent --id a", 1, "kraken certs init makes one"},
		{"check", 1, "no such file"},
		{"init", 1, "cluster"},
		{"init --cluster prod", 0, "ca.pem"},
		{"init --cluster prod", 1, "is there already"},
		{"issue --role agent --id a --days 3", 0, "agent/a.key until "},
		{"issue --role origin --id o", 1, "at least one host"},
		{"issue --role origin --id o --host o.example,10.1.1.1 --host o", 0, "origin/o.pem"},
		{"check", 1, "it expires in 72h"},
		{"check --within 1h", 0, "kraken://prod/origin/o"},
		{"renew --within 100h", 0, "agent/a.pem"},
		{"authority next", 0, ""},
		{"authority switch", 0, ""},
		{"renew --all", 0, "origin/o.pem"},
		{"authority drop", 0, ""},
		{"check --within 1h", 0, "kraken://prod/agent/a"},
		{"authority burn", 1, "burn"},
	} {
		code, out, errs := run(slices.DeleteFunc(strings.Split(c.args, " "), func(s string) bool { return s == "" })...)
		if code != c.code || !strings.Contains(out+errs, c.says) {
			t.Errorf("%s: %d: %s%s", c.args, code, out, errs)
		}
	}
}
